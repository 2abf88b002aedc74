"""Starts a zygote: its own folder, a clean environment, and nothing inherited but what it needs.
And the egress proxy beside it, likewise.

The package is loaded into the agent's interpreter from this folder, under a private name: no import
path is shared with it, and an agent's own module called like this package does not collide.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .spec import SandboxSpec
from .wire import write_all

_BOOT = """\
import importlib, importlib.util, os, sys
def load(folder, name):
    spec = importlib.util.spec_from_file_location(
        "_sandbox", os.path.join(folder, "__init__.py"), submodule_search_locations=[folder])
    sys.modules["_sandbox"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return importlib.import_module(f"_sandbox.{name}").main
main, fds = load(*sys.argv[2:4]), [int(fd) for fd in sys.argv[4:]]
sys.argv[1:] = []
del load, importlib, os, sys
main(*fds)
"""

# Libraries that start a thread per core on import: a zygote must be single-threaded.
_SINGLE_THREADED = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Launched:
    """A guardian and the parent's ends of what connects it."""

    guardian: subprocess.Popen[bytes]
    channel: socket.socket
    """Seqpacket: "ready" or an error in, orders out."""
    lifeline: socket.socket
    """Closing it ends everything."""
    output: int
    """Read end of the zygote's own stdout and stderr."""


def launch(
    spec: SandboxSpec,
    settings: Mapping[str, Any],
    *,
    python: str,
    folder: str,
    label: str,
    group: Sequence[int] = (),
) -> Launched:
    """`folder` is the zygote's working directory and HOME, and must exist. Raises `OSError`.

    `group`: descriptors that lead into the zygote's group; the caller closes them.
    `label` only shows in the list of processes.
    """
    env = {**_SINGLE_THREADED, **spec.env, "HOME": folder, "TMPDIR": folder}
    channel, far_channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    lifeline, far_lifeline = socket.socketpair()
    output, far_output = os.pipe()
    # A file and not a pipe: a pickled agent may be larger than any pipe, and nobody waits here.
    stdin = memory_file("zygote-settings", json.dumps(settings).encode())
    package = os.path.dirname(os.path.abspath(__file__))
    passed = (far_channel.fileno(), far_lifeline.fileno(), *group)
    try:
        guardian = subprocess.Popen(
            [python, "-I", "-X", "utf8", "-c", _BOOT, f"sandbox:{label}", package, "guardian"]
            + [str(fd) for fd in passed],
            env=env,
            cwd=folder,
            stdin=stdin,
            stdout=far_output,
            stderr=far_output,
            pass_fds=passed,
            start_new_session=True,
        )
    except OSError:
        channel.close()
        lifeline.close()
        os.close(output)
        raise
    finally:
        far_channel.close()
        far_lifeline.close()
        os.close(far_output)
        os.close(stdin)
    return Launched(guardian, channel, lifeline, output)


def launch_egress(settings: Mapping[str, Any]) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The egress proxy, and the channel whose end is its end. Raises `OSError`.

    In this process's own interpreter, without an environment; its stderr is this process's.
    """
    channel, far_channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stdin = memory_file("egress-settings", json.dumps(settings).encode())
    package = os.path.dirname(os.path.abspath(__file__))
    number = far_channel.fileno()
    command = [sys.executable, "-I", "-S", "-X", "utf8", "-c", _BOOT, "sandbox:egress"]
    try:
        process = subprocess.Popen(
            [*command, package, "egress", str(number)],
            env={},
            cwd="/",
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            pass_fds=[number],
            start_new_session=True,
        )
    except OSError:
        channel.close()
        raise
    finally:
        far_channel.close()
        os.close(stdin)
    return process, channel


def memory_file(name: str, content: bytes) -> int:
    """A descriptor of an anonymous file that holds `content`, at its beginning."""
    fd = os.memfd_create(name)
    try:
        write_all(fd, content)
        os.lseek(fd, 0, os.SEEK_SET)
    except OSError:
        os.close(fd)
        raise
    return fd
