"""One file of a journal: a header, then frames, each a record with its checksum.

Owns the format (`docs/wire-format.md`). Offsets are positions in the journal, not in the file; a
frame's checksum covers its offset and its length too, so a frame is whole, and where it was
written, or it is no frame. Invariant: nothing is returned whose checksum does not hold.

`journal.py` writes segments and reads them; a journal of format 1, which is one file, is read as
one segment.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from areal_sub.errors import RecordError

MAGIC = b"ASUBJRNL"
FORMAT_VERSION = 2
HEADER = struct.Struct("<8sIQI")  # magic, format version, offset of its first frame, crc32 of these
_HEADER_1 = struct.Struct("<8sII")  # magic, format version, reserved (0)
_FRAME = struct.Struct("<4sII")  # mark, payload length, crc32 of offset, length and payload
_FRAME_1 = struct.Struct("<II")  # payload length, crc32 of the payload
_COVERED = struct.Struct("<QI")  # offset and length, as the checksum sees them
# Begins each frame, so that frames behind a damaged one are found without trying every byte.
_MARK = b"\xa5\x1e\xf7\x0a"
MAX_RECORD_BYTES = 64 * 2**20
_SEARCH_BYTES = 2**20


class JournalDamage(RecordError):
    """Bytes of a segment are not what was written."""


def frame(offset: int, payload: bytes) -> bytes:
    """The frame of `payload` where it is written at `offset`."""
    return _FRAME.pack(_MARK, len(payload), _checksum(offset, payload)) + payload


def header(base: int) -> bytes:
    """Of a segment whose first frame is at the offset `base`."""
    fields = HEADER.pack(MAGIC, FORMAT_VERSION, base, 0)[:-4]
    return fields + zlib.crc32(fields).to_bytes(4, "little")


def _checksum(offset: int, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(_COVERED.pack(offset, len(payload))))


@dataclass(frozen=True, slots=True)
class Segment:
    """An open file. `version` 1 or 2; `base`: the offset of its first frame."""

    fd: int
    path: Path
    version: int
    base: int

    @classmethod
    def read(cls, fd: int, path: Path) -> Segment:
        """Check the header. Raises `RecordError` where it is none, `JournalDamage` where it was."""
        head = os.pread(fd, HEADER.size, 0)
        if len(head) < _HEADER_1.size or not head.startswith(MAGIC):
            raise RecordError(f"{path} is not a journal of areal-sub")
        version = int.from_bytes(head[8:12], "little")
        if version == 1:
            return cls(fd, path, 1, 0)
        if len(head) == HEADER.size:
            base = HEADER.unpack(head)[2]
            if head == header(base):
                return cls(fd, path, version, base)
            if zlib.crc32(head[:-4]) == HEADER.unpack(head)[3]:
                raise RecordError(
                    f"journal {path} has format version {version}; "
                    f"this release reads up to {FORMAT_VERSION}"
                )
        raise JournalDamage(f"journal {path}: its header is damaged; no record of it can be read")

    @property
    def header_bytes(self) -> int:
        return _HEADER_1.size if self.version == 1 else HEADER.size

    @property
    def frame_bytes(self) -> int:
        """What a frame has beside its payload."""
        return _FRAME_1.size if self.version == 1 else _FRAME.size

    @property
    def end(self) -> int:
        return self.base + max(0, os.fstat(self.fd).st_size - self.header_bytes)

    def payload(self, offset: int, end: int) -> bytes | None:
        """The record at `offset`; None where what is there up to `end` is a torn tail.

        Torn is what a crash in mid-write leaves: no frame is whole from `offset` on. A frame that
        is not whole with one that is behind it is `JournalDamage`.
        """
        found = self._whole(offset, end)
        if found is None and self._whole_behind(offset, end):
            raise JournalDamage(
                f"journal {self.path}: the record at offset {offset} (byte {self._at(offset)} of "
                "the file) is damaged, with more records behind it; "
                "restore the file or start another run"
            )
        return found

    def _at(self, offset: int) -> int:
        return offset - self.base + self.header_bytes

    def _whole(self, offset: int, end: int) -> bytes | None:
        head = os.pread(self.fd, self.frame_bytes, self._at(offset))
        if len(head) < self.frame_bytes:
            return None
        mark = _MARK
        if self.version == 1:
            length, crc = _FRAME_1.unpack(head)
        else:
            mark, length, crc = _FRAME.unpack(head)
        room = min(end - offset - self.frame_bytes, MAX_RECORD_BYTES)
        if mark != _MARK or not 0 < length <= room:
            return None
        payload = os.pread(self.fd, length, self._at(offset) + self.frame_bytes)
        expected = zlib.crc32(payload) if self.version == 1 else _checksum(offset, payload)
        return payload if len(payload) == length and expected == crc else None

    def _whole_behind(self, offset: int, end: int) -> bool:
        """Whether a whole frame begins behind `offset`."""
        if self.version == 1:
            return any(self._whole(at, end) is not None for at in self._steps_1(offset, end))
        at = offset + 1
        while at < end:
            data = os.pread(self.fd, min(_SEARCH_BYTES, end - at), self._at(at))
            found = data.find(_MARK)
            while found >= 0:
                if self._whole(at + found, end) is not None:
                    return True
                found = data.find(_MARK, found + 1)
            if len(data) < len(_MARK):
                return False
            at += len(data) - len(_MARK) + 1  # a mark may lie across
        return False

    def _steps_1(self, offset: int, end: int) -> list[int]:
        """Format 1 has no marks: behind a frame whose length can be believed, or nowhere."""
        head = os.pread(self.fd, _FRAME_1.size, self._at(offset))
        if len(head) < _FRAME_1.size:
            return []
        behind = offset + _FRAME_1.size + int(_FRAME_1.unpack(head)[0])
        return [behind] if behind < end else []
