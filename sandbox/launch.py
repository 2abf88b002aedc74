"""Starts a zygote: its own folder, a clean environment, and nothing inherited but what it needs.
And the egress proxy beside it, likewise.
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

from .boot import boot_command
from .layers import bwrap, gvisor
from .plan import Step
from .spec import SandboxSpec
from .wire import write_all

# The file is executed as if it were a module of the package, so that its folder counts as one.
_ASK = """\
import json, sys
module = {"__name__": "interpreter", "__file__": sys.argv[1]}
with open(sys.argv[1], "rb") as file:
    exec(compile(file.read(), sys.argv[1], "exec"), module)
print(json.dumps(module["interpreter_paths"]()))
"""
ASK_TIMEOUT_S = 20.0

# Libraries that start a thread per core on import: a zygote must be single-threaded.
_SINGLE_THREADED = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
OF_ZYGOTES = frozenset({*_SINGLE_THREADED, "HOME", "TMPDIR"})
"""What a zygote is started with stays as it is, whatever its agent is to find at its import."""


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
    outer: Sequence[Step],
    *,
    python: str,
    folder: str,
    label: str,
    group: Sequence[int] = (),
    interpreter: Sequence[str] = (),
) -> Launched:
    """`folder` is the zygote's working directory and HOME, and must exist. Raises `OSError`.

    `group`: descriptors that lead into the zygote's group; the caller closes them.
    `interpreter`: where there are `outer` steps, `interpreter_paths_of(python)`.
    `label` only shows in the list of processes.
    """
    env = {**_SINGLE_THREADED, **spec.env, "HOME": folder, "TMPDIR": folder}
    around: list[str] = []
    own_python, module = python, "guardian"
    for step in outer:
        if step.layer == gvisor.NAME:
            home = {"HOME": gvisor.FOLDER, "TMPDIR": gvisor.FOLDER}
            command, delete = gvisor.prepare(
                step.args,
                interpreter,
                folder=folder,
                argv=boot_command(python, label, "relay", [], site=False),
                env={**env, **home},
            )
            settings = {"inside": settings, "command": command, "delete": delete}
            # Ours, not the agent's: it stands outside.
            own_python, module = sys.executable, "bridge"
        else:
            around = bwrap.around(step.args, interpreter)
            env |= {"HOME": bwrap.FOLDER, "TMPDIR": bwrap.FOLDER}
    channel, far_channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    lifeline, far_lifeline = socket.socketpair()
    output, far_output = os.pipe()
    # A file and not a pipe: a pickled agent may be larger than any pipe, and nobody waits here.
    stdin = memory_file("zygote-settings", json.dumps(settings).encode())
    passed = (far_channel.fileno(), far_lifeline.fileno(), *group)
    try:
        guardian = subprocess.Popen(
            # Without site: what the agent's environment runs at the start of an interpreter (its
            # `.pth` files) is run by the zygote, enclosed.
            around + boot_command(own_python, label, module, passed, site=False),
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


def interpreter_paths_of(python: str) -> list[str]:
    """What `interpreter.interpreter_paths` says in another interpreter. Starts it, so it takes a
    while. Raises `OSError`, and `subprocess.SubprocessError` where it fails."""
    file = os.path.join(os.path.dirname(os.path.abspath(__file__)), "interpreter.py")
    asked = subprocess.run(
        [python, "-I", "-S", "-X", "utf8", "-c", _ASK, file],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=ASK_TIMEOUT_S,
        check=True,
    )
    paths: list[str] = json.loads(asked.stdout)
    return paths


def launch_egress(settings: Mapping[str, Any]) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The egress proxy, and the channel whose end is its end. Raises `OSError`.

    In this process's own interpreter, without an environment; its stderr is this process's.
    """
    channel, far_channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stdin = memory_file("egress-settings", json.dumps(settings).encode())
    number = far_channel.fileno()
    try:
        process = subprocess.Popen(
            boot_command(sys.executable, "egress", "egress", [number], site=False),
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
