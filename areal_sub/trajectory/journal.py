"""The journal: an append-only file of records, and the stream that is served from it.

Owns the file format (`docs/wire-format.md`): a 16-byte header, then frames of `u32 length`,
`u32 crc32(payload)`, payload, all little-endian. One process writes (it holds a lock on the file);
any number read. Offsets are file positions at frame boundaries, so they stay valid for ever.

Invariants: what `append` returned is in the kernel's page cache, so it outlives any process (not a
power cut: nothing is fsynced per record); a reader never sees a half-written frame; a reader's
memory is bounded by one batch, however far behind it is. A tail that was torn by a crash is cut
when the file is next opened for writing; damage anywhere else is an error, never skipped.

The proxy writes it and serves `follow`; `read_journal` is for everyone else. The trainer's ledger
(`trainer/ledger.py`) is a file of the same format.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import struct
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from areal_sub.errors import RecordError
from areal_sub.records import LedgerRecord, TrajectoryRecord, encode_record

log = logging.getLogger(__name__)

MAGIC = b"ASUBJRNL"
FORMAT_VERSION = 1
_HEADER = struct.Struct("<8sII")  # magic, format version, reserved (0)
_FRAME = struct.Struct("<II")  # payload length, crc32 of the payload
HEADER_BYTES = _HEADER.size
MAX_RECORD_BYTES = 64 * 2**20
# A batch for a reader: as many frames as start within this many bytes (one frame at least).
BATCH_BYTES = 2**20


class Journal:
    """The writing end, and `follow` for readers of the same process."""

    def __init__(self, path: Path) -> None:
        """Open or create `path`, cut a torn tail, and lock it.

        Raises `RecordError` where it is not a journal, is damaged, or has another writer.
        """
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._grown: set[asyncio.Event] = set()  # one per reader that waits for more
        try:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RecordError(f"journal {path}: another process is writing it") from None
            self.end = self._recover()
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, record: TrajectoryRecord | LedgerRecord) -> int:
        """Write `record`; returns the offset behind it. Raises `RecordError` where it cannot."""
        payload = encode_record(record)
        if len(payload) > MAX_RECORD_BYTES:
            raise RecordError(
                f"journal {self.path}: a {record.KIND} record of {len(payload)} bytes; "
                f"at most {MAX_RECORD_BYTES}"
            )
        frame = _FRAME.pack(len(payload), zlib.crc32(payload)) + payload
        try:
            written = os.pwrite(self._fd, frame, self.end)
            if written != len(frame):
                raise OSError(f"only {written} of {len(frame)} bytes were written")
        except OSError as error:
            with contextlib.suppress(OSError):  # what was written of it would be a torn tail
                os.ftruncate(self._fd, self.end)
            raise RecordError(f"journal {self.path}: cannot append: {error}") from error
        self.end += len(frame)
        for grown in self._grown:
            grown.set()
        return self.end

    async def follow(self, offset: int = 0) -> AsyncIterator[tuple[int, list[bytes]]]:
        """Batches of (offset behind the batch, records) from `offset` on, for ever.

        `offset` is 0 or one that an earlier batch or `append` gave; `RecordError` where it is not.
        """
        offset = self._checked(offset)
        grown = asyncio.Event()
        self._grown.add(grown)
        try:
            while True:
                grown.clear()
                while offset < self.end:
                    offset, records = _read_batch(self._fd, offset, self.end, self.path)
                    yield offset, records
                await grown.wait()
        finally:
            self._grown.discard(grown)

    def close(self) -> None:
        os.close(self._fd)

    def _checked(self, offset: int) -> int:
        if offset == 0:
            return HEADER_BYTES
        if not HEADER_BYTES <= offset <= self.end:
            raise RecordError(
                f"journal {self.path}: no offset {offset}; it reaches from {HEADER_BYTES} "
                f"to {self.end}"
            )
        return offset

    def _recover(self) -> int:
        """Write or check the header; returns where the next frame goes."""
        size = os.fstat(self._fd).st_size
        if size < HEADER_BYTES:
            head = os.pread(self._fd, size, 0)
            if not _HEADER.pack(MAGIC, FORMAT_VERSION, 0).startswith(head):
                raise RecordError(f"{self.path} is not a journal of areal-sub")
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, _HEADER.pack(MAGIC, FORMAT_VERSION, 0), 0)
            return HEADER_BYTES
        _check_header(self._fd, self.path)
        offset = HEADER_BYTES
        while offset < size:
            payload = _read_frame(self._fd, offset, size, self.path)
            if payload is None:
                log.warning(
                    "journal %s: cut %d bytes of a torn record at offset %d",
                    self.path,
                    size - offset,
                    offset,
                )
                os.ftruncate(self._fd, offset)
                break
            offset += _FRAME.size + len(payload)
        return offset


def _read_batch(fd: int, offset: int, end: int, path: Path) -> tuple[int, list[bytes]]:
    """The frames that start within `BATCH_BYTES` of `offset`, and the offset behind them."""
    records: list[bytes] = []
    limit = min(end, offset + BATCH_BYTES)
    while offset < limit:
        payload = _read_frame(fd, offset, end, path)
        if payload is None:
            raise RecordError(f"journal {path}: no record starts at offset {offset}")
        records.append(payload)
        offset += _FRAME.size + len(payload)
    return offset, records


def read_journal(path: Path, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """(offset behind it, record) of every whole record from `offset` on, as the file is now.

    Stops before a torn tail, so it may be used while the proxy writes. Raises `RecordError`.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        _check_header(fd, path)
        offset = offset or HEADER_BYTES
        while offset < size:
            payload = _read_frame(fd, offset, size, path)
            if payload is None:
                return
            offset += _FRAME.size + len(payload)
            yield offset, payload
    finally:
        os.close(fd)


def has_writer(path: Path) -> bool:
    """Whether a process is writing the journal at this moment."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _check_header(fd: int, path: Path) -> None:
    head = os.pread(fd, HEADER_BYTES, 0)
    if len(head) < HEADER_BYTES or not head.startswith(MAGIC):
        raise RecordError(f"{path} is not a journal of areal-sub")
    version = _HEADER.unpack(head)[1]
    if version != FORMAT_VERSION:
        raise RecordError(
            f"journal {path} has format version {version}; this release reads {FORMAT_VERSION}"
        )


def _read_frame(fd: int, offset: int, size: int, path: Path) -> bytes | None:
    """The payload of the frame at `offset`, or None where it is a torn tail.

    Torn is what a crash in mid-write leaves: a frame that the file ends within, or whose bytes up
    to the end of the file never reached the disk. A bad frame with more behind it is damage.
    """
    head = os.pread(fd, _FRAME.size, offset)
    if len(head) < _FRAME.size:
        return None
    length, crc = _FRAME.unpack(head)
    if 0 < length <= MAX_RECORD_BYTES:
        behind = offset + _FRAME.size + length
        if behind > size:
            return None
        payload = os.pread(fd, length, offset + _FRAME.size)
        if zlib.crc32(payload) == crc:
            return payload
        if behind == size:
            return None
    elif _only_zeros(fd, offset, size):
        return None
    raise RecordError(
        f"journal {path}: the record at offset {offset} is damaged, with more records behind it; "
        "restore the file or start another run"
    )


def _only_zeros(fd: int, offset: int, size: int) -> bool:
    while offset < size:
        data = os.pread(fd, BATCH_BYTES, offset)
        if data.count(0) != len(data):
            return False
        offset += len(data)
    return True
