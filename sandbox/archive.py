"""A file in memory that carries files into a child, or out of it.

    contents, one after the other | an index, JSON | the index's length, 8 bytes, big-endian

Sealed when it is complete: who holds a descriptor can read it and nothing else. Read by position
only, so that many children can read one at the same time. Made by `workspace` and `outputs`.
"""

from __future__ import annotations

import fcntl
import json
import os
from typing import Any

from .wire import write_all

_LENGTH_BYTES = 8
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_COPY_BYTES = 2**30


class Archive:
    """A complete one. Closed when nobody holds it any more: caches and runs share it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)

    @property
    def num_bytes(self) -> int:
        return os.fstat(self.fd).st_size


class Writer:
    """One that is being made."""

    def __init__(self, name: str) -> None:
        self._fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.num_bytes = 0

    def add(self, source: int, max_bytes: int) -> int | None:
        """Copy the file `source` from its position on; returns its size. None, and nothing added,
        where it holds more than `max_bytes`. Raises `OSError`."""
        size = 0
        while size <= max_bytes:
            copied = os.sendfile(self._fd, source, None, min(max_bytes + 1 - size, _COPY_BYTES))
            if copied == 0:
                self.num_bytes += size
                return size
            size += copied
        os.ftruncate(self._fd, self.num_bytes)
        os.lseek(self._fd, self.num_bytes, os.SEEK_SET)
        return None

    def append(self, content: bytes) -> None:
        """Of an archive that was complete somewhere else, as its bytes come."""
        write_all(self._fd, content)
        self.num_bytes += len(content)

    def finish(self, index: Any) -> Archive:
        encoded = json.dumps(index).encode()
        self.append(encoded + len(encoded).to_bytes(_LENGTH_BYTES, "big"))
        return self.seal()

    def seal(self) -> Archive:
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
        done, self._fd = Archive(self._fd), -1
        return done

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def read_index(fd: int) -> Any:
    """Only what is sealed is an archive: it neither changes nor keeps a reader waiting.

    Raises `OSError`, and `ValueError` where it is none.
    """
    end = os.fstat(fd).st_size - _LENGTH_BYTES
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) != _SEALS or end < 0:
        raise ValueError("it is not an archive")
    length = int.from_bytes(os.pread(fd, _LENGTH_BYTES, end), "big")
    if length > end:
        raise ValueError("it is not an archive")
    return json.loads(read_content(fd, end - length, length))


def read_content(fd: int, at: int, size: int) -> bytes:
    """Raises `OSError`, and `ValueError` where it holds less."""
    pieces = []
    while size:
        piece = os.pread(fd, min(size, _COPY_BYTES), at)
        if not piece:
            raise ValueError("the archive ends within a file")
        pieces.append(piece)
        at += len(piece)
        size -= len(piece)
    return b"".join(pieces)


def copy_content(fd: int, at: int, size: int, target: int) -> None:
    """Append that part of the archive to the file `target`. Raises `OSError`, `ValueError`."""
    while size:
        copied = os.sendfile(target, fd, at, min(size, _COPY_BYTES))
        if copied == 0:
            raise ValueError("the archive ends within a file")
        at += copied
        size -= copied
