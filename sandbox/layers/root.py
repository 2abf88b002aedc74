"""A minimal read-only root: the paths that were asked for, a few essentials, nothing else.

Built once per zygote, by a process in fresh user and mount namespaces, and entered for good: the
old root is unmounted, not covered. Everything keeps its path, so that interpreters and virtual
environments work unchanged; what is not named is absent.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .. import kernel
from .context import Context
from .scratch import BOX, PROC_OPTIONS, ROOM, TERMINALS

NAME = "root"

RUNTIMES = (
    *(f"/etc/java-{version}-openjdk" for version in (8, 11, 17, 21, 25)),
    "/etc/java",
    "/etc/php",
    "/etc/php.d",
    "/etc/php.ini",
    "/etc/R",
    "/etc/fonts",
)
"""What distributions keep there of runtimes that lie in `/usr`: without it Java has no
`java.security`, PHP no extensions, and R does not start."""
SYSTEM_PATHS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store")
ETC_PATHS = (
    "/etc/alternatives",
    "/etc/ca-certificates",
    "/etc/ca-certificates.conf",
    "/etc/gai.conf",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/localtime",
    "/etc/mime.types",
    "/etc/nsswitch.conf",
    "/etc/os-release",
    "/etc/pki",
    "/etc/protocols",
    "/etc/services",
    "/etc/ssl",
    *RUNTIMES,
)
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_LINKS = {
    "/tmp": f"{BOX}/tmp",
    "/dev/shm": f"{BOX}/shm",
    "/dev/pts": TERMINALS,
    "/dev/ptmx": f"{TERMINALS}/ptmx",
    "/dev/fd": "/proc/self/fd",
    "/dev/stdin": "/proc/self/fd/0",
    "/dev/stdout": "/proc/self/fd/1",
    "/dev/stderr": "/proc/self/fd/2",
}
INSIDE_ID = 1000
_FILES = {
    "/etc/passwd": f"agent:x:{INSIDE_ID}:{INSIDE_ID}::{BOX}/home:/bin/sh\n",
    "/etc/group": f"agent:x:{INSIDE_ID}:\n",
    "/etc/hosts": "127.0.0.1 localhost agent\n",
    "/etc/resolv.conf": "",
}
_FOLDERS = ("/proc", BOX, "/dev", "/etc")
MAX_LINKS = 40
"""On the way of one path, as the kernel has it; a path with more leads nowhere."""
_RESERVED = ("/proc", "/sys", "/dev", ROOM, BOX, "/etc", "/run", "/tmp", "/var/tmp")


@dataclass(frozen=True)
class Layout:
    """What makes up the root: `mounts` (real paths, none below another) and symbolic `links`."""

    mounts: tuple[str, ...]
    links: Mapping[str, str] = field(default_factory=dict)


def layout(paths: Iterable[str]) -> Layout:
    """Follow each path, link by link, to what has to be mounted; what is not there is left out."""
    links: dict[str, str] = {}
    real: set[str] = set()
    for path in paths:
        if os.path.lexists(path):
            resolved = _resolve(path, links)
            if os.path.exists(resolved):
                real.add(resolved)
    mounts = [path for path in sorted(real) if not any(is_below(path, other) for other in real)]
    outside = {
        link: target
        for link, target in links.items()
        if not any(is_below(link, mounted) for mounted in mounts)
    }
    return Layout(tuple(mounts), outside)


def probe() -> str:
    return ""  # a part of `namespaces`


def apply(args: Mapping[str, Any], context: Context) -> None:
    """`readable`: paths to show; `hidden`: folders and files to cover; `mounts`: path inside →
    path to show there. At `context.folder`, any one that can be mounted over, the root is put
    together. Becomes the user `INSIDE_ID`."""
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    wanted = layout([*SYSTEM_PATHS, *ETC_PATHS, *args["readable"], *context.readable])
    for path in wanted.mounts:
        _check_can_be_shown(path)
    for inside, outside in args["mounts"].items():
        if in_the_way := _in_the_way(inside, wanted):
            raise ValueError(f"mounts: {inside} cannot be made: {in_the_way} is shown there")
        if not os.path.exists(outside):
            raise ValueError(f"mounts: there is no {outside}")
        _check_can_be_shown(os.path.realpath(outside))
    # Taken by the user whose paths they are, before anything is covered.
    covered = _covered(args["hidden"], args["mounts"])
    trees = [(path, kernel.clone_tree(path)) for path in wanted.mounts]
    for inside, outside in args["mounts"].items():
        trees.append((inside, kernel.clone_tree(os.path.realpath(outside))))
    devices = [(path, kernel.clone_tree(path)) for path in DEVICES]
    flags = kernel.MS_NOSUID | kernel.MS_NODEV
    owner = f"mode=0755,uid={INSIDE_ID},gid={INSIDE_ID}"
    kernel.mount("tmpfs", context.folder, "tmpfs", flags, f"size=1m,nr_inodes=4k,{owner}")
    os.chdir(context.folder)
    os.setresgid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
    os.setresuid(INSIDE_ID, INSIDE_ID, INSIDE_ID)

    for folder in _FOLDERS:
        os.makedirs(_in_root(folder), 0o755, exist_ok=True)
    kernel.mount("proc", _in_root("/proc"), "proc", flags | kernel.MS_NOEXEC, PROC_OPTIONS)
    for path, text in _FILES.items():
        with open(_in_root(path), "w", encoding="utf-8") as file:  # at hand, in every version
            file.write(text)
    for link, target in {**_LINKS, **wanted.links}.items():
        if any(is_below(path, link) for path in wanted.mounts):
            continue  # /tmp, where the project lies in it: a folder, then, and read-only
        os.makedirs(os.path.dirname(_in_root(link)), 0o755, exist_ok=True)
        os.symlink(target, _in_root(link))
    read_only = kernel.MOUNT_ATTR_RDONLY | kernel.MOUNT_ATTR_NOSUID
    for path, fd in trees:
        _attach(fd, path, read_only | kernel.MOUNT_ATTR_NODEV)
    for path, fd in devices:  # read-only is the inode, its mode and owner; the device is written to
        _attach(fd, path, read_only)
    for path in covered:
        if os.path.isdir(_in_root(path)):
            cover = flags | kernel.MS_RDONLY
            options = "size=4k,nr_inodes=1,mode=0555"
            kernel.mount("tmpfs", _in_root(path), "tmpfs", cover, options)
        elif os.path.exists(_in_root(path)):  # a device that is none there: nobody can open it
            null = kernel.clone_tree(_in_root("/dev/null"))
            kernel.restrict_tree(null, read_only | kernel.MOUNT_ATTR_NODEV)
            kernel.attach_tree(null, _in_root(path))
            os.close(null)
    kernel.pivot_root(".")
    kernel.restrict_tree(-100, read_only | kernel.MOUNT_ATTR_NODEV, "/", recursive=False)


def _check_can_be_shown(path: str) -> None:
    if path == "/" or path in _RESERVED or path.startswith(("/proc/", "/sys/")):
        raise ValueError(f"{path} cannot be shown to children: name a folder below it")


def _covered(hidden: Iterable[str], mounts: Mapping[str, str]) -> list[str]:
    """Where `hidden` lies inside: at its own path, and in every mount of what is around it."""
    real = [os.path.realpath(path) for path in hidden]
    trees = {inside: os.path.realpath(outside) for inside, outside in mounts.items()}
    return real + [
        os.path.normpath(os.path.join(inside, os.path.relpath(path, outside)))
        for path in real
        for inside, outside in trees.items()
        if path == outside or is_below(path, outside)
    ]


def hidden_in(shown: Layout, hidden: Iterable[str]) -> list[str]:
    """For tiers that lay out the same paths by other means: which of them have to be covered."""
    return [
        path
        for path in map(os.path.realpath, hidden)
        if os.path.exists(path)
        and any(path == mounted or is_below(path, mounted) for mounted in shown.mounts)
    ]


def _in_the_way(inside: str, wanted: Layout) -> str:
    """The path that is shown at, above or below `inside`; "" where there is none."""
    for path in (*wanted.mounts, *_LINKS, *wanted.links):
        if path == inside or is_below(path, inside) or is_below(inside, path):
            return path
    return ""


def _in_root(path: str) -> str:
    """Where `path` is while the root is put together, in the working directory."""
    return f".{path}"


def _attach(fd: int, path: str, attributes: int) -> None:
    target = _in_root(path)
    try:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            os.makedirs(target, 0o755, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT, 0o666))
        kernel.restrict_tree(fd, attributes)
        kernel.attach_tree(fd, target)
    finally:
        os.close(fd)


def _resolve(path: str, links: dict[str, str]) -> str:
    """The real path; every symbolic link on the way is noted in `links`."""
    pending = [part for part in path.split("/") if part]
    at = "/"
    num_followed = 0
    while pending:
        step = os.path.normpath(os.path.join(at, pending.pop(0)))
        if os.path.islink(step) and num_followed < MAX_LINKS:
            num_followed += 1
            target = os.readlink(step)
            links[step] = target
            pending[:0] = [part for part in target.split("/") if part]
            at = "/" if target.startswith("/") else at
        else:
            at = step
    return at


def is_below(path: str, folder: str) -> bool:
    return path != folder and path.startswith(folder.rstrip("/") + "/")
