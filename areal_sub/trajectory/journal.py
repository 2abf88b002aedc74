"""The journal: an append-only sequence of records, and the stream that is served from it.

A folder of segments (`segment.py`), each named by the offset that it begins at. One process writes
(it holds a lock on the folder); any number read. Offsets are positions in the whole sequence, so
they stay valid for ever, also when the oldest segments are gone.

Invariants: what `append` returned is in the kernel's page cache, so it outlives any process (and a
power cut, as far as `JournalPolicy.fsync` says); a reader never sees a half-written frame, nor one
whose checksum does not hold; a reader's memory is bounded by one batch, however far behind it is.
A tail that was torn by a crash is cut when the journal is next opened for writing; damage anywhere
else is an error that names segment and offset, never skipped in silence. A segment is removed only
when all of it is acknowledged.

The proxy writes it and serves `follow`; `read_journal` is for everyone else. The trainer's ledger
(`trainer/ledger.py`) is a journal too.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import fcntl
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from areal_sub.errors import RecordError
from areal_sub.records import LedgerRecord, TrajectoryRecord, encode_record
from areal_sub.trajectory.segment import (
    HEADER,
    MAX_RECORD_BYTES,
    JournalDamage,
    Segment,
    frame,
    header,
)

log = logging.getLogger(__name__)

# A batch for a reader: as many frames as start within this many bytes (one frame at least).
BATCH_BYTES = 2**16
_SUFFIX = ".segment"
_ENDS = ("end", "closed")  # records that close something: what `fsync="end"` waits for


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalPolicy:
    """`JournalConfig`, for processes that load no configuration."""

    segment_bytes: int = 64 * 2**20
    retain_bytes: int | None = None
    retain_age_s: float | None = None
    fsync: Literal["never", "end", "always"] = "never"


class Journal:
    """The writing end, and `follow` for readers of the same process."""

    def __init__(self, path: Path, policy: JournalPolicy | None = None) -> None:
        """Open or create the folder `path`, cut a torn tail, and lock it.

        Raises `RecordError` where it is not a journal, is damaged, or has another writer.
        """
        self.path = path
        self._policy = policy or JournalPolicy()
        self._grown: set[asyncio.Event] = set()  # one per reader that waits for more
        self._acknowledged = 0
        if path.exists() and not path.is_dir():
            _refuse_file(path)
        path.mkdir(mode=0o700, exist_ok=True)
        self._lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._segment: Segment | None = None
        try:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RecordError(f"journal {path}: another process is writing it") from None
            self._bases = _bases(path)
            self.end = self._recover()
        except BaseException:
            self.close()
            raise

    @property
    def begin(self) -> int:
        """The offset of the first record that is still there."""
        return self._bases[0]

    def append(self, record: TrajectoryRecord | LedgerRecord) -> int:
        """Write `record`; returns the offset behind it. Raises `RecordError` where it cannot."""
        payload = encode_record(record)
        if len(payload) > MAX_RECORD_BYTES:
            raise RecordError(
                f"journal {self.path}: a {record.KIND} record of {len(payload)} bytes; "
                f"at most {MAX_RECORD_BYTES}"
            )
        policy = self._policy
        if self._segment is None:
            raise RecordError(f"journal {self.path}: it is closed")
        try:
            if self.end - self._bases[-1] >= policy.segment_bytes:
                self._roll(self._segment)
            fd, at = self._segment.fd, HEADER.size + self.end - self._bases[-1]
            framed = frame(self.end, payload)
            try:
                written = os.pwrite(fd, framed, at)
                if written != len(framed):
                    raise OSError(f"only {written} of {len(framed)} bytes were written")
                if policy.fsync == "always" or (policy.fsync == "end" and record.KIND in _ENDS):
                    os.fdatasync(fd)
            except OSError:
                with contextlib.suppress(OSError):  # what was written would be a torn tail
                    os.ftruncate(fd, at)
                raise
        except OSError as error:
            raise RecordError(f"journal {self.path}: cannot append: {error}") from error
        self.end += len(framed)
        for grown in self._grown:
            grown.set()
        return self.end

    def acknowledge(self, offset: int) -> None:
        """Nobody will ask for records before `offset` any more: they may go, by the policy."""
        self._acknowledged = max(self._acknowledged, min(offset, self.end))
        self._retire()

    async def follow(self, offset: int = 0) -> AsyncIterator[tuple[int, list[bytes]]]:
        """Batches of (offset behind the batch, records) from `offset` on, for ever.

        `offset` is 0, which is the first record that is still there, or one that an earlier batch
        or `append` gave; `RecordError` where it is not.
        """
        offset = offset or self.begin
        if not self.begin <= offset <= self.end:
            raise RecordError(
                f"journal {self.path}: no offset {offset}; it reaches from {self.begin} "
                f"to {self.end}"
            )
        grown = asyncio.Event()
        self._grown.add(grown)
        try:
            while True:
                grown.clear()
                while offset < self.end:
                    offset, records = self._read_batch(offset)
                    yield offset, records
                await grown.wait()
        finally:
            self._grown.discard(grown)

    def close(self) -> None:
        if self._segment is not None:
            os.close(self._segment.fd)
            self._segment = None
        os.close(self._lock)

    def _read_batch(self, offset: int) -> tuple[int, list[bytes]]:
        """The frames that start within `BATCH_BYTES` of `offset` in its segment, and the offset
        behind them."""
        number = bisect.bisect_right(self._bases, offset) - 1
        if number < 0:
            raise RecordError(f"journal {self.path}: offset {offset} is gone; it had been read")
        is_last = number == len(self._bases) - 1
        end = self.end if is_last else self._bases[number + 1]
        records: list[bytes] = []
        with _opened(self.path, self._bases[number]) as segment:
            limit = min(end, offset + BATCH_BYTES)
            while offset < limit:
                payload = segment.payload(offset, end)
                if payload is None:
                    raise JournalDamage(
                        f"journal {segment.path}: no record starts at offset {offset}"
                    )
                records.append(payload)
                offset += segment.frame_bytes + len(payload)
        return offset, records

    def _recover(self) -> int:
        """Open the last segment, or make the first; returns where the next frame goes."""
        if not self._bases:
            self._begin_segment(0)
            return 0
        base = self._bases[-1]
        path = _segment_path(self.path, base)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        if os.fstat(fd).st_size < HEADER.size:  # a crash in the middle of its making
            os.close(fd)
            self._bases.pop()
            self._begin_segment(base)
            return base
        try:
            self._segment = Segment.read(fd, path)
        except BaseException:
            os.close(fd)
            raise
        _check_base(self._segment, base)
        offset, end = base, self._segment.end
        while offset < end:
            payload = self._segment.payload(offset, end)
            if payload is None:
                log.warning(
                    "journal %s: cut %d bytes of a torn record at offset %d",
                    path,
                    end - offset,
                    offset,
                )
                os.ftruncate(fd, HEADER.size + offset - base)
                break
            offset += self._segment.frame_bytes + len(payload)
        return offset

    def _roll(self, full: Segment) -> None:
        if self._policy.fsync != "never":
            os.fdatasync(full.fd)
        self._begin_segment(self.end)
        os.close(full.fd)
        self._retire()

    def _begin_segment(self, base: int) -> None:
        path = _segment_path(self.path, base)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            if os.pwrite(fd, header(base), 0) != HEADER.size:
                raise OSError("no space for its header")
            if self._policy.fsync != "never":
                os.fsync(fd)
                os.fsync(self._lock)  # the folder, which lists it
        except BaseException:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        self._bases.append(base)
        self._segment = Segment(fd, path, 2, base)

    def _retire(self) -> None:
        """Remove the oldest segments that are acknowledged, as far as the policy says."""
        policy = self._policy
        while len(self._bases) > 1 and self._bases[1] <= self._acknowledged:
            path = _segment_path(self.path, self._bases[0])
            too_many = (
                policy.retain_bytes is not None and self.end - self.begin > policy.retain_bytes
            )
            if not (too_many or self._is_too_old(path)):
                return
            path.unlink(missing_ok=True)
            del self._bases[0]
            log.info("journal %s: removed %s, which is done with", self.path, path.name)

    def _is_too_old(self, path: Path) -> bool:
        age_s = self._policy.retain_age_s
        if age_s is None:
            return False
        try:
            return time.time() - path.stat().st_mtime > age_s
        except FileNotFoundError:  # somebody was faster
            return True


def read_journal(
    path: Path, offset: int = 0, *, damage: list[str] | None = None
) -> Iterator[tuple[int, bytes]]:
    """(offset behind it, record) of every whole record from `offset` on, as it is now.

    Stops before a torn tail, so it may be used while the proxy writes. Damage raises
    `RecordError`; where `damage` is given it is told there instead, and reading goes on with the
    next segment. A journal that is not there yet has no records.
    """
    if not path.is_dir():
        if path.exists():
            yield from _records_of_file(path, offset)
        return
    bases = _bases(path)
    if not bases:  # its writer has only just made it, or crashed then
        return
    start = max(0, bisect.bisect_right(bases, offset) - 1)
    for base, next_base in zip(bases[start:], [*bases[start + 1 :], None], strict=True):
        try:
            yield from _records_of_segment(path, base, next_base, max(base, offset))
        except RecordError as error:
            if damage is None:
                raise
            damage.append(str(error))


def _records_of_segment(
    path: Path, base: int, next_base: int | None, offset: int
) -> Iterator[tuple[int, bytes]]:
    try:
        if next_base is None and _segment_path(path, base).stat().st_size < HEADER.size:
            return  # its writer has only just made it, or crashed then
        with _opened(path, base) as segment:
            end = segment.end if next_base is None else next_base
            while offset < end:
                payload = segment.payload(offset, end)
                if payload is None:
                    break
                offset += segment.frame_bytes + len(payload)
                yield offset, payload
            if next_base is not None and offset != next_base:
                raise JournalDamage(
                    f"journal {segment.path}: it ends at offset {offset}, before the next segment, "
                    f"which begins at {next_base}: {next_base - offset} bytes are damaged or gone"
                )
    except FileNotFoundError:  # removed meanwhile: it was done with
        return


def _records_of_file(path: Path, offset: int) -> Iterator[tuple[int, bytes]]:
    """Of a journal of format 1."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_size == 0:
            return
        segment = Segment.read(fd, path)
        end = segment.end
        while offset < end:
            payload = segment.payload(offset, end)
            if payload is None:
                return
            offset += segment.frame_bytes + len(payload)
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


def journal_begin(path: Path) -> int:
    """The offset of the first record that is still there; above 0: earlier ones were removed."""
    return min(_bases(path), default=0) if path.is_dir() else 0


def segment_files(path: Path) -> list[Path]:
    """The files of the journal `path`, oldest first."""
    return [_segment_path(path, base) for base in _bases(path)] if path.is_dir() else [path]


def _bases(path: Path) -> list[int]:
    return sorted(int(p.stem) for p in path.glob(f"*{_SUFFIX}") if p.stem.isdecimal())


def _segment_path(path: Path, base: int) -> Path:
    return path / f"{base:020d}{_SUFFIX}"


@contextlib.contextmanager
def _opened(path: Path, base: int) -> Iterator[Segment]:
    segment_path = _segment_path(path, base)
    fd = os.open(segment_path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        segment = Segment.read(fd, segment_path)
        _check_base(segment, base)
        yield segment
    finally:
        os.close(fd)


def _check_base(segment: Segment, base: int) -> None:
    if segment.base != base:
        raise JournalDamage(
            f"journal {segment.path}: by its header it begins at offset {segment.base}"
        )


def _refuse_file(path: Path) -> None:
    """Raises `RecordError`: `path`, which is a file, cannot be written as a journal."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        version = Segment.read(fd, path).version
    finally:
        os.close(fd)
    raise RecordError(
        f"journal {path} has format version {version}, which this release reads but does not "
        "write: choose another trial_name=..., or move the file away"
    )
