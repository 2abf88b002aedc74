"""Looks for secrets wherever a child can look. Its own, "CANARY-own-...", shows that it can find.

A file can hold one only if it was changed since they were made: others are not read, so that all of
the file system can be walked.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator
from typing import Any

from on_processes import canaries, memory

MAX_READ_BYTES = 2**20
# What /proc has once per thread or file, and what waits for news when it is read.
SKIPPED = {"task", "map_files", "mem", "pagemap", "kmsg", "kcore", "kpagecount", "kpageflags"}


def act(data: dict[str, Any]) -> dict[str, Any]:
    # Its own key, where it has to be found: in a file, and by the file's name in /proc/self/maps.
    with open(os.path.join(os.environ["HOME"], os.environ["OWN_KEY"]), "w+") as file:
        file.write(os.environ["OWN_KEY"])
        file.flush()
        mapped = mmap.mmap(file.fileno(), 1)
    found: dict[str, set[str]] = {}
    num: dict[str, int] = {}

    def look(where: str, raw: bytes) -> None:
        num[where] = num.get(where, 0) + 1
        found.setdefault(where, set()).update(canaries(raw))

    for variable in os.environb.items():
        look("environment", b"=".join(variable))
    for name in os.listdir("/proc/self/fd"):
        try:
            look("descriptors", os.readlink(f"/proc/self/fd/{name}").encode())
        except FileNotFoundError:
            continue
    for part in memory():
        look("memory", part)
    for entry in _files(["/proc"], SKIPPED):
        look("/proc", os.fsencode(entry.path))
        look("/proc", _read(entry.path))
    starts = ["/", *data["folders"], *sys.path, "/usr", "/etc", "/dev", "/run", "/var", "/tmp"]
    starts = [path for path in starts if path.strip("/").partition("/")[0] not in data["skipped"]]
    starts += [os.environ["HOME"], "/home", "/root", "/opt", "/srv"]
    for entry in _files(starts, {"proc", *data["skipped"]}):
        num["names"] = num.get("names", 0) + 1
        try:
            changed_at = entry.stat(follow_symlinks=False).st_ctime
        except OSError:
            continue
        if changed_at >= data["since"] and entry.is_file(follow_symlinks=False):
            look("files", os.fsencode(entry.path))
            look("files", _read(entry.path))
    mapped.close()
    return {"found": {where: sorted(names) for where, names in found.items()}, "num": num}


def _files(starts: list[str], skipped: set[str]) -> Iterator[os.DirEntry[str]]:
    """All that is not a folder, below `starts`, each once."""
    seen: set[tuple[int, int]] = set()
    pending = list(starts)
    while pending:
        folder = pending.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as listing:
                entries = [entry for entry in listing if entry.name not in skipped]
        except OSError:
            continue
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                pending.append(entry.path)
            else:
                yield entry


def _read(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return b""
    try:
        return os.read(fd, MAX_READ_BYTES)
    except OSError:
        return b""
    finally:
        os.close(fd)
