"""The journal: what is appended is read back, whatever cut the file, however far behind one is."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from areal_sub.errors import RecordError
from areal_sub.records import OpenRecord, decode_record, encode_record
from areal_sub.trajectory import journal as journal_module
from areal_sub.trajectory.journal import HEADER_BYTES, Journal, read_journal


def record(number: int, size: int = 1) -> OpenRecord:
    return OpenRecord(
        rollout_id=f"r{number}",
        group_id="g" * size,
        task_id="t",
        split="train",
        policy_version=number,
        opened_at=0.0,
    )


def write(path: Path, count: int) -> list[int]:
    journal = Journal(path)
    offsets = [journal.append(record(i)) for i in range(count)]
    journal.close()
    return offsets


def test_append_and_read(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    offsets = write(path, 3)
    assert [decode_record(raw) for _, raw in read_journal(path)] == [record(i) for i in range(3)]
    assert [offset for offset, _ in read_journal(path)] == offsets
    assert [decode_record(raw) for _, raw in read_journal(path, offsets[1])] == [record(2)]
    journal = Journal(path)  # goes on where it ended
    journal.append(record(3))
    journal.close()
    assert len(list(read_journal(path))) == 4
    assert path.stat().st_mode & 0o777 == 0o600


def test_every_torn_tail_is_cut_to_the_last_whole_record(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    offsets = [HEADER_BYTES, *write(path, 2)]
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        kept = sum(offset <= size for offset in offsets[1:])
        if size >= HEADER_BYTES:
            assert len(list(read_journal(path))) == kept
        journal = Journal(path)
        assert journal.end == offsets[kept]
        journal.append(record(9))
        journal.close()
        read = [decode_record(raw) for _, raw in read_journal(path)]
        assert read == [*[record(i) for i in range(kept)], record(9)]


@pytest.mark.parametrize("tail", [b"\0" * 5, b"\0" * 5000])
def test_a_tail_of_zeros_is_torn(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "journal"
    write(path, 2)
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert len(list(read_journal(path))) == 2
    Journal(path).close()
    assert path.read_bytes() == whole


def test_damage_before_the_tail_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    offsets = write(path, 3)
    whole = path.read_bytes()
    for position in (HEADER_BYTES + 8, offsets[0] + 20, HEADER_BYTES + 3):
        damaged = bytearray(whole)
        damaged[position] ^= 0x40
        path.write_bytes(damaged)
        if position == HEADER_BYTES + 3:  # a length that reaches beyond the end: looks torn
            continue
        with pytest.raises(RecordError, match=r"damaged|offset"):
            Journal(path)
        with pytest.raises(RecordError, match="damaged"):
            list(read_journal(path))


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    for content in (b"hello", b"x" * 100, b"ASUBJRNL\x02\0\0\0\0\0\0\0"):
        path.write_bytes(content)
        with pytest.raises(RecordError, match=r"not a journal|version 2"):
            Journal(path)
        assert path.read_bytes() == content


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    with pytest.raises(RecordError, match="another process"):
        Journal(tmp_path / "journal")
    journal.close()
    Journal(tmp_path / "journal").close()


def test_a_failed_append_leaves_no_torn_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.append(record(0))
    real = os.pwrite
    with monkeypatch.context() as patch:  # a disk that is full in the middle of a record
        patch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:9], offset))
        with pytest.raises(RecordError, match="only 9 of"):
            journal.append(record(1))
    assert path.stat().st_size == journal.end
    journal.append(record(2))
    journal.close()
    assert [decode_record(raw).rollout_id for _, raw in read_journal(path)] == ["r0", "r2"]


def test_following_in_bounded_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "BATCH_BYTES", 1000)
    journal = Journal(tmp_path / "journal")
    written = [record(i, size=5000 if i % 3 == 0 else 100) for i in range(20)]

    async def read(offset: int, count: int) -> tuple[list[bytes], list[int]]:
        records: list[bytes] = []
        offsets = []
        items = journal.follow(offset)
        async for offset, batch in items:
            assert sum(map(len, batch)) <= 1000 + max(map(len, batch))
            records += batch
            offsets.append(offset)
            if len(records) >= count:
                break
        await items.aclose()  # type: ignore[attr-defined]
        return records, offsets

    async def work() -> None:
        for item in written[:10]:
            journal.append(item)
        early = asyncio.ensure_future(read(0, 20))
        await asyncio.sleep(0)
        for item in written[10:]:
            journal.append(item)
            await asyncio.sleep(0)
        records, offsets = await early
        assert records == [encode_record(item) for item in written]
        assert offsets[-1] == journal.end
        for at, offset in enumerate(offsets[:-1]):
            rest, _ = await read(offset, 1)
            assert rest[0] in records, at
        with pytest.raises(RecordError, match=r"damaged|no record starts"):
            await read(HEADER_BYTES + 1, 1)

    asyncio.run(asyncio.wait_for(work(), 20))
    journal.close()
