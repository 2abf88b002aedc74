"""Groups of processes (cgroups) that the kernel bounds and accounts as one: one for each child.

Owned by the caller of a zygote, who stands outside of all namespaces and alone sees the file system
of groups. Below its own group it makes, per zygote,

    sandbox-<pid>-<number>/   zygote        the zygote, and what it forks that enters no other
                              child-<n>     the processes of one child

and hands descriptors out (`enter`), by which a process puts itself in: the kernel asks who opened
them, so that works from inside of any namespace. A child's group is new each time: what a former
child left charged (files in the page cache, memory that the zygote shares) is not the next one's.

Two kinds of machines: v2, one tree, where this process's group is delegated; v1, a tree for each of
memory, pids and cpuacct, where they are writable. Formats: cgroups(7), and the kernel's
admin-guide/cgroup-v2 and cgroup-v1/memory.

Invariants: the zygote's group has limits of its own, so a zygote that keeps its children in it is
bounded, too. Every group is removed by whoever made it, at the latest by the guardian, which
outlives both; what is left where that was killed goes when the next zygote starts.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .errors import SandboxError

CONTROLLERS = ("memory", "pids")
_V1_CONTROLLERS = (*CONTROLLERS, "cpuacct")
MAX_FOLDERS = len(_V1_CONTROLLERS)
"""A group is a folder in each of so many trees."""
MOVED = "sandbox-outside"
"""v2: where the processes of a delegated group are put, which may have some or groups, not both."""
HINT = (
    "start it with `systemd-run --user --scope -p Delegate=yes` (as root without --user), or in a "
    "container that may write its own /sys/fs/cgroup"
)
REMOVE_TIMEOUT_S = 5.0
_PREFIX = "sandbox-"
_numbers = itertools.count(1)


class NoGroups(SandboxError):
    """This process can make no groups. Says why, and what to do."""


@dataclass(frozen=True)
class Place:
    """The group of this process: below it others may be made."""

    version: int
    folders: tuple[str, ...]
    """v1: in the order of `_V1_CONTROLLERS`."""
    is_top: bool = False
    """v2: nothing of the tree above it can be seen: a container's."""


@dataclass(frozen=True)
class Usage:
    """What the processes of a group have used together, those that nobody waited for, too."""

    cpu_s: float
    peak_memory_bytes: int
    """The kernel's own for them, and files in memory, included."""
    num_oom_kills: int


def places(membership: str, mountinfo: str) -> list[Place]:
    """From /proc/self/cgroup and /proc/self/mountinfo: where to try, the best first. Pure."""
    mounts: dict[str, tuple[str, str]] = {}  # controller ("": v2) → what is mounted, where
    for line in mountinfo.splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        root, target = (_unescaped(path) for path in fields.split(" ")[3:5])
        names = {"cgroup2": [""], "cgroup": options.split(",")}.get(kind, [])
        for name in names:
            mounts.setdefault(name, (root, target))
    folders: dict[str, tuple[str, bool]] = {}
    for line in membership.splitlines():
        _, names_of_line, path = line.split(":", 2)
        for name in names_of_line.split(","):
            if name in mounts:
                root, target = mounts[name]
                below = path.removeprefix(root.rstrip("/")).strip("/")
                folders[name] = (f"{target}/{below}".rstrip("/"), not below)
    found = []
    if "" in folders:
        folder, is_top = folders[""]
        if os.path.basename(folder) == MOVED:
            folder = os.path.dirname(folder)
        found.append(Place(2, (folder,), is_top))
    if all(name in folders for name in _V1_CONTROLLERS):
        found.append(Place(1, tuple(folders[name][0] for name in _V1_CONTROLLERS)))
    return found


def _unescaped(path: str) -> str:
    return path.encode().decode("unicode_escape") if "\\" in path else path


def find() -> Place:
    """Where groups can be made. v2: makes the place fit for it. Raises `NoGroups`."""
    try:
        with open("/proc/self/cgroup") as file, open("/proc/self/mountinfo") as mounts:
            candidates = places(file.read(), mounts.read())
    except OSError as error:
        raise NoGroups(f"the groups of this process cannot be read: {error}") from None
    reasons = []
    for place in candidates:
        try:
            _make_fit(place)
        except (NoGroups, OSError) as error:
            reasons.append(f"v{place.version}: {error}")
        else:
            return place
    raise NoGroups(f"{'; '.join(reasons) or 'no cgroup file system is mounted'}; {HINT}")


def _make_fit(place: Place) -> None:
    for folder in place.folders:
        if not os.access(folder, os.W_OK):
            raise NoGroups(f"{folder} cannot be written to")
    if place.version == 1:
        return
    (folder,) = place.folders
    lacking = set(CONTROLLERS).difference(_read(f"{folder}/cgroup.controllers").split())
    if lacking:
        raise NoGroups(f"{folder} has no controller {' and '.join(sorted(lacking))}")
    if set(CONTROLLERS).issubset(_read(f"{folder}/cgroup.subtree_control").split()):
        return
    if os.path.exists(f"{folder}/cgroup.type"):  # not the root of all
        if not (place.is_top or _is_delegated(folder)):
            raise NoGroups(f"{folder} is not delegated")
        _move_all(folder)
    _write(f"{folder}/cgroup.subtree_control", " ".join(f"+{name}" for name in CONTROLLERS))


def _is_delegated(folder: str) -> bool:
    """To its owner, or, as systemd says it, to root. Else whoever made it goes on managing it."""
    if os.stat(folder).st_uid == os.geteuid() != 0:
        return True
    for name in ("user.delegate", "trusted.delegate"):
        with contextlib.suppress(OSError):
            if os.getxattr(folder, name) == b"1":
                return True
    return False


def _move_all(folder: str) -> None:
    """Put the processes of `folder` a level lower. Raises `OSError`."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(f"{folder}/{MOVED}")
    deadline = time.monotonic() + REMOVE_TIMEOUT_S
    while pids := _read(f"{folder}/cgroup.procs").split():
        if time.monotonic() > deadline:
            raise TimeoutError(f"new processes keep coming into {folder}")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                _write(f"{folder}/{MOVED}/cgroup.procs", pid)


class Group:
    """One group that exists. Raises `OSError` where the kernel refuses."""

    def __init__(
        self, version: int, folders: Sequence[str], memory_bytes: int, processes: int
    ) -> None:
        self._version = version
        self._folders = folders
        made = []
        try:
            for folder in folders:
                os.mkdir(folder)
                made.append(folder)
            if version == 2:
                (one,) = folders
                limits = {
                    f"{one}/memory.max": memory_bytes,
                    f"{one}/memory.swap.max": 0,
                    f"{one}/memory.oom.group": 1,
                    f"{one}/pids.max": processes,
                }
            else:
                memory, pids, _ = folders
                limits = {
                    f"{memory}/memory.limit_in_bytes": memory_bytes,
                    f"{memory}/memory.memsw.limit_in_bytes": memory_bytes,
                    # The buffers of TCP connections, which v1 counts apart.
                    f"{memory}/memory.kmem.tcp.limit_in_bytes": memory_bytes,
                    f"{pids}/pids.max": processes,
                }
            for path, limit in limits.items():
                # Absent where the kernel does not count what is swapped out, or no network.
                optional = "swap" in path or "memsw" in path or "tcp" in path
                with contextlib.suppress(*([FileNotFoundError] if optional else [])):
                    _write(path, str(limit))
        except OSError:
            remove(made)
            raise

    def enter(self) -> list[int]:
        """Descriptors for one process: one that writes "0" to each of them is in (`layers`)."""
        # v1: by its `tasks`, a process with one thread need not wait for all the others to pause.
        name = "cgroup.procs" if self._version == 2 else "tasks"
        fds: list[int] = []
        try:
            for folder in self._folders:
                fds.append(os.open(f"{folder}/{name}", os.O_WRONLY))
        except OSError:
            for fd in fds:
                os.close(fd)
            raise
        return fds

    def usage(self) -> Usage:
        if self._version == 2:
            (one,) = self._folders
            cpu_s = _entry(_read(f"{one}/cpu.stat"), "usage_usec") / 1e6
            num_oom_kills = _entry(_read(f"{one}/memory.events"), "oom_kill")
            peak = f"{one}/memory.peak"
        else:
            memory, _, cpuacct = self._folders
            cpu_s = int(_read(f"{cpuacct}/cpuacct.usage")) / 1e9
            num_oom_kills = _entry(_read(f"{memory}/memory.oom_control"), "oom_kill")
            peak = f"{memory}/memory.max_usage_in_bytes"
        peak_bytes = 0
        with contextlib.suppress(FileNotFoundError):  # v2 has it since Linux 5.19
            peak_bytes = int(_read(peak))
        return Usage(cpu_s, peak_bytes, num_oom_kills)

    def remove(self) -> bool:
        """False: there are processes in it, or the last one has not quite gone."""
        return remove(self._folders)


class Groups:
    """The groups of one zygote, by limits. Raises `OSError` where the kernel refuses."""

    def __init__(
        self, place: Place, *, zygote: Mapping[str, int], child: Mapping[str, int]
    ) -> None:
        """The limits: `memory_bytes`, `processes`."""
        _remove_stale(place)
        name = f"{_PREFIX}{os.getpid()}-{next(_numbers)}"
        self.folders = [f"{folder}/{name}" for folder in place.folders]
        self._version = place.version
        self._child = child
        self._num_children = 0
        try:
            for folder in self.folders:
                os.mkdir(folder)
                if place.version == 2:
                    wanted = " ".join(f"+{name}" for name in CONTROLLERS)
                    _write(f"{folder}/cgroup.subtree_control", wanted)
            self.zygote = self._make("zygote", zygote)
        except OSError:
            remove_all(self.folders, timeout_s=0.0)
            raise

    def new(self) -> Group:
        """For one more child."""
        self._num_children += 1
        return self._make(f"child-{self._num_children}", self._child)

    def _make(self, name: str, limits: Mapping[str, int]) -> Group:
        folders = [f"{folder}/{name}" for folder in self.folders]
        return Group(self._version, folders, limits["memory_bytes"], limits["processes"])


def remove(folders: Sequence[str]) -> bool:
    """Remove groups without others below; whether all are gone. Never raises."""
    left = False
    for folder in folders:
        try:
            os.rmdir(folder)
        except FileNotFoundError:
            continue
        except OSError:
            left = True
    return not left


def remove_all(folders: Sequence[str], timeout_s: float = REMOVE_TIMEOUT_S) -> bool:
    """Remove the groups of a zygote whose processes are gone, or about to be. Never raises."""
    deadline = time.monotonic() + timeout_s
    pause_s = 0.0002
    while left := [folder for folder in folders if not _remove_tree(folder)]:
        folders = left
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause_s)  # there is no event for all
        pause_s = min(2 * pause_s, 0.05)
    return True


def _remove_tree(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            below = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return remove(below) and remove([folder])


def _remove_stale(place: Place) -> None:
    """What killed callers and guardians have left: groups without processes, of dead callers."""
    for folder in place.folders:
        for name in os.listdir(folder):
            pid, _, number = name.removeprefix(_PREFIX).partition("-")
            if not (name.startswith(_PREFIX) and pid.isdigit() and number.isdigit()):
                continue
            # Where a process is left in a zygote's group, it is in use, whatever its name says.
            if not os.path.exists(f"/proc/{pid}") and remove([f"{folder}/{name}/zygote"]):
                _remove_tree(f"{folder}/{name}")


def _read(path: str) -> str:
    fd = os.open(path, os.O_RDONLY)
    try:
        parts = []
        while part := os.read(fd, 2**16):
            parts.append(part)
        return b"".join(parts).decode()
    finally:
        os.close(fd)


def _write(path: str, content: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, content.encode())
    finally:
        os.close(fd)


def _entry(text: str, name: str) -> int:
    """The number in the line of `text` that starts with `name`."""
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    raise OSError(f"the kernel does not tell {name!r} of a group")
