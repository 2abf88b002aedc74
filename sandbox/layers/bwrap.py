"""bubblewrap around everything: a second wall, written by others, of the same kind as ours.

`command` is what goes in front of the guardian: new namespaces and a root in which only the same
paths are shown, read-only. Within it the tier `namespaces` is built as it is without. Nothing of
the host can be written from in there: what the processes need, they make in their own memory.

As root there is no user namespace around (it could hold no user but root): the guardian becomes an
unprivileged user itself, before it starts anything.

What starts programs is imported where it is used: guardians and keepers load this module, too, and
never do, but each of their forks would pay for those modules' memory, and for `threading`'s hook.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .. import kernel
from .context import Context
from .root import ETC_PATHS, SYSTEM_PATHS, Layout, hidden_in, layout

NAME = "bwrap"
FOLDER = "/box"
"""In place of the zygote's folder, in there: an empty one; nobody may ask for it to be shown."""
NOBODY = 65534
PROBE_TIMEOUT_S = 8.0
# Root's guardian needs these until it has become nobody, and to see /proc uncovered before that.
_ROOTS_CAPABILITIES = ("CAP_SYS_ADMIN", "CAP_SETUID", "CAP_SETGID")
# Loads the package from the folder in argv[1] and does what `probe` needs to know inside.
_TRY = """\
import importlib.util as util, os, sys
spec = util.spec_from_file_location(
    "_sandbox", os.path.join(sys.argv[1], "__init__.py"), submodule_search_locations=[sys.argv[1]])
sys.modules["_sandbox"] = module = util.module_from_spec(spec)
spec.loader.exec_module(module)
from _sandbox.layers import bwrap, context, namespaces
bwrap.apply({}, context.Context())
print(namespaces.probe() or "works")
"""


def command(bwrap: str, shown: Layout, hidden: Sequence[str], *, as_root: bool) -> list[str]:
    """What to put in front of a program's words. `hidden`: folders and files that are shown."""
    words = [bwrap, "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-net"]
    words += ["--unshare-cgroup-try", "--cap-drop", "ALL"]
    if as_root:
        for capability in _ROOTS_CAPABILITIES:
            words += ["--cap-add", capability]
    else:
        words += ["--unshare-user"]
    # The guardian is pid 1: where it ends, and it does with bwrap, so does everything in there.
    words += ["--as-pid-1", "--die-with-parent"]
    for path in shown.mounts:
        # By themselves, folders on the way would be its own user's alone.
        words += ["--dir", os.path.dirname(path), "--ro-bind", path, path]
    words += ["--proc", "/proc", "--dev", "/dev", "--dir", FOLDER]
    for link, target in shown.links.items():
        words += ["--symlink", target, link]
    for path in hidden:
        if os.path.isfile(path):
            words += ["--ro-bind", os.devnull, path]
        else:
            words += ["--tmpfs", path, "--remount-ro", path]
    return [*words, "--remount-ro", "/", "--chdir", FOLDER, "--"]


def around(args: Mapping[str, Any], interpreter: Iterable[str]) -> list[str]:
    """`command` for a step's `readable` and `hidden`, on this machine, as this user.

    `interpreter`: what the interpreter inside needs to read. Raises `FileNotFoundError` where
    there is no bwrap.
    """
    import shutil

    program = shutil.which(NAME)
    if program is None:
        raise FileNotFoundError(_how_to_install())
    shown = layout([*SYSTEM_PATHS, *ETC_PATHS, *args["readable"], *interpreter])
    hidden = hidden_in(shown, args["hidden"])
    return command(program, shown, hidden, as_root=os.getuid() == 0)


def probe() -> str:
    """Runs it around an interpreter that tries our own namespaces inside."""
    import subprocess

    # Here, since `interpreter` is for the agent's: this one may differ from it.
    from ..interpreter import interpreter_paths

    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        words = around({"readable": [], "hidden": []}, interpreter_paths())
        tried = subprocess.run(
            [*words, sys.executable, "-I", "-c", _TRY, package],
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError as error:
        return str(error)
    except subprocess.TimeoutExpired:
        return f"bwrap did not end within {PROBE_TIMEOUT_S:g} s"
    said = (tried.stdout + tried.stderr).strip().rpartition("\n")[2][:500]
    if tried.returncode == 0 and said == "works":
        return ""
    return (
        f"bwrap is there, but our own namespaces do not work in it ({said}). Where AppArmor "
        "restricts user namespaces, its profile for bwrap refuses nested ones: the tier "
        "namespaces needs none"
    )


def apply(args: Mapping[str, Any], context: Context) -> None:
    """Inside, before anything else is started. Becomes nobody where it is root."""
    if os.getuid() != 0:
        return
    # bwrap has covered parts of root's: with those, no /proc could be mounted further in.
    kernel.unmount("/proc")
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    kernel.mount("proc", "/proc", "proc", flags)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)  # its capabilities are gone with this
    kernel.set_dumpable(True)  # changing users hid /proc/self from its owner
    kernel.die_with_parent(signal.SIGKILL)  # and undid this


def _how_to_install() -> str:
    return (
        "there is no program `bwrap` on the PATH: install bubblewrap (Debian, Ubuntu: apt install "
        "bubblewrap; Fedora: dnf install bubblewrap)"
    )
