"""Declared outputs of a child: collected when all its processes are gone, bounded, by plain names.

Everything in the folder is hostile: links, pipes, holes, trees without end, names that a terminal
or a file system would obey. Only regular files with one name are taken, opened beneath the folder
without following any link; anything else is refused by its name, with the reason. Each read is
bounded by what was asked for, not by what a file says of itself, so that it also holds against
a process that would still write (`collect` needs no quiet folder).

`collect` runs in the init of a cell, at the caller in the tier `process`, for a `relay` in gVisor;
`read` at the caller.
"""

from __future__ import annotations

import errno
import fnmatch
import itertools
import json
import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import archive, kernel
from .errors import SpecError
from .wire import MAX_LINE_CHARS, one_line, text

COLLECT_TIMEOUT_S = 5.0
MAX_ORDER_BYTES = 2**16
MAX_REFUSED = 100
"""Refusals beyond this are only counted."""
MAX_LISTED = 100_000
"""Names that are compared with globs."""
MAX_DEPTH = 64
MAX_NAME_BYTES = 1024
COLLECTED = b"outputs"
"""Comes after the status, with the descriptor of the archive; or, without one, before a reason."""
_MAGIC = frozenset("*?[")


@dataclass(frozen=True)
class Order:
    """What to collect."""

    paths: tuple[str, ...]
    max_bytes: int
    max_files: int

    def encode(self) -> bytes:
        return json.dumps([self.paths, self.max_bytes, self.max_files]).encode()

    @classmethod
    def decode(cls, raw: bytes) -> Order:
        paths, max_bytes, max_files = json.loads(raw)
        return cls(tuple(paths), max_bytes, max_files)


@dataclass(frozen=True)
class Outputs:
    """What was collected: names are relative paths that can be printed, texts are cleaned."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    refused: tuple[tuple[str, str], ...] = ()
    """(name, why) of what was declared, or lay in a declared folder, and was not taken."""
    missing: tuple[str, ...] = ()
    """Declared, and not there."""


def make_order(paths: Sequence[str], max_bytes: int, max_files: int) -> Order:
    """Raises `SpecError` naming the path that cannot be declared."""
    if isinstance(paths, str) or not all(isinstance(path, str) for path in paths):
        raise SpecError(f"outputs must be a list of paths, not {paths!r}")
    for path in paths:
        parts = path.split("/")
        if path != "." and any(part in ("", ".", "..") for part in parts):
            raise SpecError(
                f"outputs: {path!r} is not a plain relative path: no '..', no '/' at its ends"
            )
        if not is_plain(path):
            raise SpecError(f"outputs: {path!r} is too long, or cannot be printed")
        if "**" in parts:
            raise SpecError(f"outputs: {path!r}: there is no '**'; a folder brings all below it")
    order = Order(tuple(dict.fromkeys(paths)), max_bytes, max_files)
    if len(order.encode()) > MAX_ORDER_BYTES:
        raise SpecError(f"outputs: {len(paths)} paths are too many: name the folder around them")
    return order


def is_plain(name: str) -> bool:
    """Can be shown, written to a record, and used as a path anywhere."""
    return name.isprintable() and len(name.encode()) <= MAX_NAME_BYTES


def nothing(order: Order, reason: str) -> archive.Archive:
    """Where what `order` names cannot be collected."""
    refused = [(path, reason) for path in order.paths[:MAX_REFUSED]]
    return _packed(archive.Writer("outputs"), refused=refused, num_refused=len(order.paths))


def _packed(writer: archive.Writer, **index: Any) -> archive.Archive:
    return writer.finish({"files": [], "refused": [], "num_refused": 0, "missing": [], **index})


def max_archive_bytes(order: Order) -> int:
    """What the archive for `order` can have at most: files, and an index in which JSON makes up to
    three of a name's bytes, and up to twelve of a character."""
    names = order.max_files * (3 * MAX_NAME_BYTES + 32)
    refused = MAX_REFUSED * 12 * 2 * MAX_LINE_CHARS
    return order.max_bytes + names + refused + MAX_ORDER_BYTES + 1024


def collect(around: str, folder: str, order: Order) -> archive.Archive:
    """What `order` names in `folder`, a path below `around`, which no child can replace.

    Raises `OSError` where the folder itself is not there, or not a folder.
    """
    top = os.open(around, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        root = kernel.open_beneath(top, folder, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
    finally:
        os.close(top)
    try:
        return _Collection(root, order).run()
    finally:
        os.close(root)


def read(packed: archive.Archive) -> Outputs:
    """Of an archive that may have come out of gVisor. Raises `OSError` and `ValueError`."""
    try:
        return _read(packed)
    except (AttributeError, LookupError, TypeError, RecursionError, OverflowError):
        raise ValueError("the archive of outputs is malformed") from None


def _read(packed: archive.Archive) -> Outputs:
    index = archive.read_index(packed.fd)
    files: dict[str, bytes] = {}
    at = 0
    for name, size in index["files"]:
        if not is_plain(name) or os.path.isabs(name) or ".." in name.split("/"):
            raise ValueError(f"{one_line(name)} is not a plain name")
        if size < 0:
            raise ValueError(f"{name}: a file of {size} bytes")
        files[name] = archive.read_content(packed.fd, at, size)
        at += size
    refused = [(_shown(name), text(why)) for name, why in index["refused"]]
    if index["num_refused"] > len(refused):
        refused.append(("", f"{index['num_refused'] - len(refused)} more"))
    return Outputs(files, tuple(refused), tuple(map(_shown, index["missing"])))


def _shown(name: str) -> str:
    return one_line(name).replace("\t", "\\t")


class _Full(Exception):
    """Nothing more is looked at."""


class _Collection:
    """One collecting of one folder."""

    def __init__(self, root: int, order: Order) -> None:
        self._root = root
        self._order = order
        self._writer = archive.Writer("outputs")
        self._seen: set[str] = set()
        self._files: list[tuple[str, int]] = []
        self._refused: list[tuple[str, str]] = []
        self._num_refused = 0
        self._num_listed = 0
        self._deadline = time.monotonic() + COLLECT_TIMEOUT_S

    def run(self) -> archive.Archive:
        missing = []
        try:
            for path in self._order.paths:
                num_there = sum(self._take(match) for match in self._matches(path))
                if num_there == 0:
                    missing.append(path)
        except _Full:
            pass
        return _packed(
            self._writer,
            files=self._files,
            refused=self._refused,
            num_refused=self._num_refused,
            missing=missing,
        )

    def _matches(self, path: str) -> list[str]:
        """The paths that a declared one means; without a glob in it, itself."""
        if not _MAGIC & set(path):
            return [path]
        found = [""]
        for part in path.split("/"):
            if not _MAGIC & set(part):
                found = [_join(folder, part) for folder in found]
                continue
            found = [
                _join(folder, name)
                for folder in found
                for name in self._listed(folder or ".", refusing=False)
                if fnmatch.fnmatchcase(name, part)
            ]
        return found

    def _take(self, path: str) -> bool:
        """Take a file, or all that is below a folder. False: it is not there."""
        pending = [path]
        is_there = False
        while pending:
            name = pending.pop()
            if name in self._seen:
                is_there = True
                continue
            try:
                fd = self._open(name, os.O_PATH | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno == errno.ENOTDIR:  # a file where a folder would be on the way
                    continue
                is_there = True
                self._count(name)
                self._refuse(name, _why(error))
                continue
            try:
                info = os.fstat(fd)
            finally:
                os.close(fd)
            is_there = True
            self._count(name)
            if reason := self._reason(name, info):
                self._refuse(name, reason)
            elif stat.S_ISDIR(info.st_mode):
                names = self._listed(name, refusing=True)
                inside = [_join("" if name == "." else name, each) for each in names]
                pending += reversed(inside)
            else:
                self._copy(name)
        return is_there

    def _reason(self, name: str, info: os.stat_result) -> str:
        """Why this is not taken; "" where nothing speaks against it yet."""
        if not is_plain(name):
            return "its name is too long, or cannot be printed"
        if name.count("/") >= MAX_DEPTH:
            return f"it lies deeper than {MAX_DEPTH} folders"
        if stat.S_ISDIR(info.st_mode):
            return ""
        if not stat.S_ISREG(info.st_mode):
            return f"it is {_KINDS.get(stat.S_IFMT(info.st_mode), 'no file')}"
        if info.st_nlink != 1:
            return f"it is a hard link: a file of {info.st_nlink} names"
        if info.st_size > self._left():
            return self._too_large()
        return ""

    def _copy(self, name: str) -> None:
        try:
            fd = self._open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            self._refuse(name, _why(error))
            return
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                self._refuse(name, "it changed while it was looked at")
                return
            size = self._writer.add(fd, self._left())
        except OSError as error:
            self._refuse(name, _why(error))
            return
        finally:
            os.close(fd)
        if size is None:
            self._refuse(name, self._too_large())
        else:
            self._files.append((name, size))

    def _left(self) -> int:
        return self._order.max_bytes - self._writer.num_bytes

    def _too_large(self) -> str:
        return f"with it the outputs are larger than {self._order.max_bytes} bytes"

    def _listed(self, folder: str, *, refusing: bool) -> list[str]:
        """The names in a folder, as many as may still be looked at; those of none where it cannot
        be listed."""
        most = MAX_LISTED - self._num_listed
        if refusing:
            most = min(most, self._order.max_files - len(self._seen))
        try:
            fd = self._open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            if refusing:
                self._refuse(folder, _why(error))
            return []
        try:
            with os.scandir(fd) as entries:
                names = [entry.name for entry in itertools.islice(self._in_time(entries), most + 1)]
        finally:
            os.close(fd)
        if time.monotonic() > self._deadline:
            self._refuse(
                folder, f"it and others: collecting took longer than {COLLECT_TIMEOUT_S} s"
            )
            raise _Full
        self._num_listed += len(names)
        if len(names) > most:  # those that were listed are all that is looked at
            self._refuse(folder, "it holds more than is looked at; the rest is left out")
        return sorted(names[:most])

    def _open(self, path: str, flags: int) -> int:
        return kernel.open_beneath(self._root, path, flags)

    def _in_time(self, entries: Iterable[os.DirEntry[str]]) -> Iterator[os.DirEntry[str]]:
        for entry in entries:
            if time.monotonic() > self._deadline:
                return
            yield entry

    def _count(self, name: str) -> None:
        if len(self._seen) >= self._order.max_files:
            self._refuse(name, f"it and others: more than {self._order.max_files} files, folders")
            raise _Full
        if time.monotonic() > self._deadline:
            self._refuse(name, f"it and others: collecting took longer than {COLLECT_TIMEOUT_S} s")
            raise _Full
        self._seen.add(name)

    def _refuse(self, name: str, why: str) -> None:
        self._num_refused += 1
        if len(self._refused) < MAX_REFUSED:
            self._refused.append((_shown(name), why))


_KINDS: Mapping[int, str] = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _why(error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "it lies behind a symbolic link"
    return f"it cannot be opened: {errno.errorcode.get(error.errno or 0, str(error))}"


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def collected(raw: bytes, fds: Sequence[int]) -> Any:
    """What an init sent: an `Archive`, which takes the first descriptor, or the reason why not."""
    if fds:
        return archive.Archive(fds[0])
    return text(raw.partition(b"\n")[2].decode("utf-8", "replace")) or "they were not collected"
