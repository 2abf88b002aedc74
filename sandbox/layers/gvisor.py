"""gVisor around everything: a kernel of its own, in user space, between the agent and the host's.

`prepare` writes a bundle (OCI runtime specification) with the same read-only paths that other tiers
show, and `runsc` runs the relay in it. Nothing of the host can be written from in there, and there
is no network but loopback. As root, runsc makes its own processes unprivileged; else it runs
rootless.

What starts programs is imported where it is used, as in `bwrap`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .context import Context
from .root import ETC_PATHS, INSIDE_ID, SYSTEM_PATHS, Layout, hidden_in, layout

NAME = "gvisor"
PROGRAM = "runsc"
FOLDER = "/box"
"""In place of the zygote's folder, in there: a file system in memory."""
PROBE_TIMEOUT_S = 9.0
_CAPABILITIES = ("CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_SETUID", "CAP_SETGID", "CAP_KILL")
_FILES = {
    "/etc/passwd": f"agent:x:{INSIDE_ID}:{INSIDE_ID}::{FOLDER}:/bin/sh\n",
    "/etc/group": f"agent:x:{INSIDE_ID}:\n",
    "/etc/hosts": "127.0.0.1 localhost agent\n",
    "/etc/resolv.conf": "",
}
_FOLDERS = ("/proc", "/sys", "/dev", "/tmp", "/etc", FOLDER)
# Loads the package from the folder in argv[1] and does what `probe` needs to know inside.
_TRY = """\
import importlib.util as util, os, sys
spec = util.spec_from_file_location(
    "_sandbox", os.path.join(sys.argv[1], "__init__.py"), submodule_search_locations=[sys.argv[1]])
sys.modules["_sandbox"] = module = util.module_from_spec(spec)
spec.loader.exec_module(module)
from _sandbox import layers, probe
found = probe.probe(layers.INSIDE_GVISOR).layers
print("; ".join(f"{name}: {reason}" for name, reason in found.items() if reason) or "works")
"""


def config(
    shown: Layout,
    hidden: Sequence[str],
    *,
    argv: Sequence[str],
    env: Mapping[str, str],
    scratch_bytes: int,
    nothing: str,
) -> dict[str, Any]:
    """The bundle's `config.json`. `nothing`: an empty file, to cover files with."""
    bind = ["rbind", "ro", "nosuid", "nodev"]
    tmpfs = ["nosuid", "nodev", f"size={scratch_bytes}"]
    mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        *(
            {"destination": at, "type": "bind", "source": at, "options": bind}
            for at in shown.mounts
            if at not in hidden
        ),
        *(
            {"destination": at, "type": "bind", "source": nothing, "options": bind}
            if os.path.isfile(at)
            else {
                "destination": at,
                "type": "tmpfs",
                "source": "tmpfs",
                "options": ["ro", "nosuid", "nodev", "mode=0555"],
            }
            for at in hidden
        ),
        *(
            {"destination": at, "type": "tmpfs", "source": "tmpfs", "options": tmpfs}
            for at in (FOLDER, "/tmp")
            if at not in shown.mounts
        ),
    ]
    return {
        "ociVersion": "1.0.0",
        "hostname": "agent",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": list(argv),
            "env": [f"{name}={value}" for name, value in env.items()],
            "cwd": FOLDER,
            "noNewPrivileges": True,
            "capabilities": {
                kind: list(_CAPABILITIES) for kind in ("bounding", "effective", "permitted")
            },
        },
        "root": {"path": "rootfs", "readonly": True},
        "mounts": mounts,
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "network")]
        },
    }


def command(runsc: str, folder: str, name: str, *, as_root: bool) -> tuple[list[str], list[str]]:
    """What runs the bundle in `folder`, and what deletes whatever is left of it."""
    options = [runsc, f"--root={folder}/state", "--network=none", "--ignore-cgroups"]
    if not as_root:
        options += ["--rootless"]
    run = [*options, "run", f"--bundle={folder}/bundle", name]
    return run, [*options, "delete", "--force", name]


def prepare(
    args: Mapping[str, Any],
    interpreter: Iterable[str],
    *,
    folder: str,
    argv: Sequence[str],
    env: Mapping[str, str],
) -> tuple[list[str], list[str]]:
    """Write the bundle for a step's `readable`, `hidden`, `scratch_bytes` below `folder`, which is
    removed by whoever made it. Returns `command`. Raises `FileNotFoundError` without runsc."""
    import shutil
    from pathlib import Path

    program = shutil.which(PROGRAM)
    if program is None:
        raise FileNotFoundError(_how_to_install())
    shown = layout([*SYSTEM_PATHS, *ETC_PATHS, *args["readable"], *interpreter])
    hidden = hidden_in(shown, args["hidden"])
    root = Path(folder) / "bundle" / "rootfs"
    nothing = root.parent / "nothing"
    made = config(
        shown,
        hidden,
        argv=argv,
        env=env,
        scratch_bytes=args["scratch_bytes"],
        nothing=str(nothing),
    )
    for path in _FOLDERS:
        (root / path[1:]).mkdir(parents=True, exist_ok=True)
    for path, text in _FILES.items():
        (root / path[1:]).write_text(text)
    for path in shown.mounts:
        at = root / path[1:]
        if os.path.isdir(path):
            at.mkdir(parents=True, exist_ok=True)
        else:
            at.parent.mkdir(parents=True, exist_ok=True)
            at.touch()
    for link, target in shown.links.items():
        at = root / link[1:]
        if not at.is_dir():  # /tmp, where the project lies in it
            at.parent.mkdir(parents=True, exist_ok=True)
            at.symlink_to(target)
    for at in (root, *root.rglob("*")):
        if not at.is_symlink():  # whatever the umask is: others have to see through it
            at.chmod(0o755 if at.is_dir() else 0o644)
    nothing.touch()
    (root.parent / "config.json").write_text(json.dumps(made))
    return command(program, folder, f"sandbox-{os.urandom(8).hex()}", as_root=os.getuid() == 0)


def probe() -> str:
    """Runs it around an interpreter that tries inside what the tier needs there."""
    import subprocess
    import tempfile

    # Here, since `interpreter` is for the agent's: this one may differ from it.
    from ..interpreter import interpreter_paths

    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    argv = [sys.executable, "-I", "-c", _TRY, package]
    args = {"readable": [], "hidden": [], "scratch_bytes": 2**20}
    with tempfile.TemporaryDirectory(prefix="sandbox-probe-") as folder:
        try:
            run, delete = prepare(args, interpreter_paths(), folder=folder, argv=argv, env={})
        except FileNotFoundError as error:
            return str(error)
        try:
            return _try(run)
        finally:
            subprocess.run(
                delete, stdin=subprocess.DEVNULL, capture_output=True, timeout=5, check=False
            )


def _try(run: Sequence[str]) -> str:
    import subprocess

    tried = subprocess.Popen(
        # As root, runsc gives what it gets here to nobody: never a file of the host's.
        run,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        said, _ = tried.communicate(timeout=PROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        tried.kill()
        tried.communicate()
        return f"runsc did not end within {PROBE_TIMEOUT_S:g} s"
    text = said.decode(errors="replace").strip().rpartition("\n")[2][:500]
    if tried.returncode == 0 and text == "works":
        return ""
    return (
        f"runsc is there, but what the tier needs does not work in it ({text}). Try `runsc "
        "--rootless --network=none do true`; in a container it needs the same rights as namespaces"
    )


def apply(args: Mapping[str, Any], context: Context) -> None:
    """There is nothing left to do inside."""


def _how_to_install() -> str:
    return (
        "there is no program `runsc` on the PATH: install gVisor (Debian: apt install runsc; "
        "others: gvisor.dev/docs/user_guide/install)"
    )
