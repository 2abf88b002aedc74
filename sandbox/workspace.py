"""A folder's content as the beginning of a child's working directory.

The caller packs the template into an archive (`Templates`), once for as long as nothing in it
changes; the descriptor comes to the sealed child with its request, and the child unpacks it
(`unpacking`) before any of the agent's code runs: so its files are the child's own, within the
child's own limits, and the template stays as it is.
"""

from __future__ import annotations

import collections
import hashlib
import os
import stat
import threading
from collections.abc import Iterator
from typing import Any

from . import archive
from .errors import SpecError
from .spec import Limits, is_text
from .unpacking import FILE, FOLDER, LINK

CACHE_BYTES = 2**28
CACHE_TEMPLATES = 64


class Templates:
    """Packs templates, and keeps the last ones packed. Its method may be called from any thread."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._packed: collections.OrderedDict[str, tuple[bytes, archive.Archive]] = (
            collections.OrderedDict()
        )
        self._lock = threading.Lock()

    def packed(self, folder: str) -> archive.Archive:
        """The archive of `folder` as it is now. Raises `SpecError` naming what cannot be packed."""
        if not is_text(folder):
            raise SpecError(f"workspace: {folder!r} cannot be a path")
        root = os.path.realpath(folder)
        with self._lock:
            signature = _signature(root, self._limits)
            known = self._packed.pop(root, None)
            if known is not None and known[0] == signature:
                self._packed[root] = known
                return known[1]
            made = pack(root, self._limits)
            self._packed[root] = (signature, made)
            while len(self._packed) > 1 and (
                len(self._packed) > CACHE_TEMPLATES
                or sum(each.num_bytes for _, each in self._packed.values()) > CACHE_BYTES
            ):
                self._packed.popitem(last=False)
            return made


def pack(folder: str, limits: Limits) -> archive.Archive:
    """Files with their mode and time, folders, and symbolic links that stay within. A file with
    several names becomes several files. Raises `SpecError` naming anything else."""
    root = os.path.realpath(folder)
    writer = archive.Writer("workspace")
    entries: list[list[Any]] = []
    for name, info in _walk(root, limits):
        path = os.path.join(root, name)
        mode, size, target = stat.S_IMODE(info.st_mode) & 0o777, 0, ""
        if stat.S_ISDIR(info.st_mode):
            kind, mode = FOLDER, mode | 0o700
        elif stat.S_ISLNK(info.st_mode):
            kind, target = LINK, _target_within(root, path)
        elif stat.S_ISREG(info.st_mode):
            kind, size = FILE, _add(writer, path, limits)
        else:
            raise SpecError(f"workspace: {path!r} is neither a file nor a folder nor a link")
        entries.append([name, kind, mode, info.st_mtime_ns, size, target])
    return writer.finish(entries)


def _walk(root: str, limits: Limits) -> Iterator[tuple[str, os.stat_result]]:
    """(relative path, what it is) of everything below `root`; folders before what is in them."""
    num_found = 0
    pending = [""]
    while pending:
        folder = pending.pop()
        path = os.path.join(root, folder) if folder else root
        try:
            with os.scandir(path) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
            found = [
                (os.path.join(folder, entry.name), entry.stat(follow_symlinks=False))
                for entry in entries
            ]
        except OSError as error:
            raise SpecError(f"workspace: {path!r} cannot be read: {error.strerror}") from None
        num_found += len(found)
        if num_found > limits.workspace_files:
            raise SpecError(
                f"workspace: {root!r} holds more than {limits.workspace_files} files and folders "
                "(limits.workspace_files)"
            )
        yield from found
        pending += [name for name, info in found if stat.S_ISDIR(info.st_mode)]


def _signature(root: str, limits: Limits) -> bytes:
    """Changes with whatever changes below `root`."""
    digest = hashlib.blake2b(digest_size=16)
    for name, info in _walk(root, limits):
        seen = (info.st_mode, info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino)
        digest.update(os.fsencode(name) + b"\0" + repr(seen).encode())
    return digest.digest()


def _target_within(root: str, path: str) -> str:
    target = os.readlink(path)
    resolved = os.path.realpath(path)
    if os.path.isabs(target) or not f"{resolved}/".startswith(root.rstrip("/") + "/"):
        raise SpecError(f"workspace: the link {path!r} leads out of it, to {target!r}")
    return target


def _add(writer: archive.Writer, path: str, limits: Limits) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            size = writer.add(fd, limits.workspace_bytes - writer.num_bytes)
        finally:
            os.close(fd)
    except OSError as error:
        raise SpecError(f"workspace: {path!r} cannot be read: {error.strerror}") from None
    if size is None:
        raise SpecError(
            f"workspace: with {path!r} its files have more than {limits.workspace_bytes} bytes "
            "together (limits.workspace_bytes)"
        )
    return size
