"""The journal: what is appended is read back, whatever cut the files, however far behind one is."""

from __future__ import annotations

import asyncio
import os
import signal
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_sub.errors import RecordError
from areal_sub.records import EndRecord, OpenRecord, Outcome, decode_record, encode_record
from areal_sub.trajectory import journal as journal_module
from areal_sub.trajectory.journal import (
    Journal,
    JournalPolicy,
    has_writer,
    journal_begin,
    read_journal,
    segment_files,
)
from areal_sub.trajectory.segment import HEADER


def record(number: int, size: int = 1) -> OpenRecord:
    return OpenRecord(
        rollout_id=f"r{number}",
        group_id="g" * size,
        task_id="t",
        split="train",
        policy_version=number,
        opened_at=0.0,
    )


def end(rollout_id: str) -> EndRecord:
    return EndRecord.without_process(rollout_id, Outcome.COMPLETED, reward=1.0, num_turns=0)


def write(path: Path, count: int, policy: JournalPolicy | None = None) -> list[int]:
    """`count` records; the offsets behind them."""
    journal = Journal(path, policy)
    offsets = [journal.append(record(i)) for i in range(count)]
    journal.close()
    return offsets


def numbers(path: Path, offset: int = 0, damage: list[str] | None = None) -> list[int]:
    read = (decode_record(raw) for _, raw in read_journal(path, offset, damage=damage))
    return [int(each.rollout_id[1:]) for each in read]


SMALL = JournalPolicy(segment_bytes=150)  # two records of `write` in each segment


def test_append_and_read(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    assert numbers(path) == []
    path.mkdir(mode=0o700)  # as a crash leaves it that comes before the first segment
    assert numbers(path) == numbers(path, 5) == []
    offsets = write(path, 3)
    assert numbers(path) == [0, 1, 2]
    assert [offset for offset, _ in read_journal(path)] == offsets
    assert numbers(path, offsets[1]) == [2]
    journal = Journal(path)  # goes on where it ended
    journal.append(record(3))
    journal.close()
    assert numbers(path) == [0, 1, 2, 3]
    (file,) = segment_files(path)
    assert file.stat().st_mode & 0o777 == 0o600 and path.stat().st_mode & 0o777 == 0o700


def test_segments_are_one_sequence(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    offsets = write(path, 9, SMALL)
    assert len(segment_files(path)) == 5
    assert [offset for offset, _ in read_journal(path)] == offsets
    for i, offset in enumerate(offsets):
        assert numbers(path, offset) == list(range(i + 1, 9))
    journal = Journal(path, SMALL)
    assert journal.append(record(9)) == journal.end > offsets[-1]
    journal.close()
    assert numbers(path) == list(range(10))


def test_every_torn_tail_is_cut_to_the_last_whole_record(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    offsets = [0, *write(path, 2)]
    (file,) = segment_files(path)
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        kept = sum(offset + HEADER.size <= size for offset in offsets[1:])
        assert numbers(path) == list(range(kept))
        journal = Journal(path)
        assert journal.end == offsets[kept]
        journal.append(record(9))
        journal.close()
        assert numbers(path) == [*range(kept), 9]


@pytest.mark.parametrize("tail", [b"\0" * 5, b"\0" * 5000, b"\xa5\x1e\xf7\x0a" * 3])
def test_a_tail_of_anything_but_a_record_is_torn(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "journal"
    write(path, 2)
    (file,) = segment_files(path)
    whole = file.read_bytes()
    file.write_bytes(whole + tail)
    assert numbers(path) == [0, 1]
    Journal(path).close()
    assert file.read_bytes() == whole


def test_damage_names_the_segment_and_the_offset_and_other_segments_are_read(
    tmp_path: Path,
) -> None:
    path = tmp_path / "journal"
    offsets = [0, *write(path, 6, SMALL)]
    files = segment_files(path)
    whole = files[1].read_bytes()
    for position in range(HEADER.size, len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x40
        files[1].write_bytes(damaged)
        first = position < HEADER.size + offsets[3] - offsets[2]
        with pytest.raises(
            RecordError, match=f"{files[1].name}.*offset {offsets[2 + (not first)]}"
        ):
            numbers(path)
        damage: list[str] = []
        assert numbers(path, damage=damage) == ([0, 1, 4, 5] if first else [0, 1, 2, 4, 5])
        assert len(damage) == 1
    files[1].unlink()
    with pytest.raises(RecordError, match="before the next segment"):
        numbers(path)


def test_damage_of_the_last_segment_is_not_taken_for_a_torn_tail(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    offsets = write(path, 3)
    (file,) = segment_files(path)
    whole = file.read_bytes()
    for position in range(HEADER.size + offsets[1]):
        damaged = bytearray(whole)
        damaged[position] ^= 0x40
        file.write_bytes(damaged)
        with pytest.raises(RecordError, match=r"damaged|not a journal"):
            Journal(path)
        with pytest.raises(RecordError, match=r"damaged|not a journal"):
            numbers(path)
        assert file.read_bytes() == damaged


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=12),
    segment_bytes=st.integers(1, 2000),
    data=st.data(),
)
def test_any_prefix_and_any_flipped_bit_give_an_intact_prefix_and_never_a_wrong_record(
    sizes: list[int], segment_bytes: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal"
        journal = Journal(path, JournalPolicy(segment_bytes=segment_bytes))
        written = [record(i, size) for i, size in enumerate(sizes)]
        offsets = [0]
        for each in written:
            offsets.append(journal.append(each))
        journal.close()
        files = segment_files(path)
        number = data.draw(st.integers(0, len(files) - 1), "segment")
        raw = files[number].read_bytes()
        at = data.draw(st.integers(0, len(raw) - 1), "byte")
        cut = data.draw(st.booleans(), "cut")
        flipped = raw[at] ^ (1 << data.draw(st.integers(0, 7), "bit"))
        files[number].write_bytes(raw[:at] if cut else raw[:at] + bytes([flipped]) + raw[at + 1 :])

        begin = int(files[number].stem)  # records before `at` are whole
        intact = sum(end <= begin + at - HEADER.size for end in offsets[1:])
        damage: list[str] = []
        read = list(read_journal(path, damage=damage))
        got = dict(read)
        assert [got[end] for end in offsets[1 : intact + 1]] == [
            encode_record(each) for each in written[:intact]
        ]
        by_offset = dict(zip(offsets[1:], written, strict=True))
        for offset, payload in read:
            assert payload == encode_record(by_offset[offset])
        if number < len(files) - 1:
            following = [end for end in offsets[1:] if end > int(files[number + 1].stem)]
            assert [offset for offset, _ in read][-len(following) :] == following
            assert damage and files[number].name in damage[0]
        try:
            journal = Journal(path)
        except RecordError:
            return
        journal.append(record(99))  # what is written after a cut is read
        journal.close()
        assert decode_record(list(read_journal(path, damage=[]))[-1][1]) == record(99)


def test_a_journal_of_format_1_is_read_and_refused_for_writing(tmp_path: Path) -> None:
    path = tmp_path / "0001.journal"
    payloads = [encode_record(record(i)) for i in range(3)]
    frames = [struct.pack("<II", len(raw), zlib.crc32(raw)) + raw for raw in payloads]
    whole = struct.pack("<8sII", b"ASUBJRNL", 1, 0) + b"".join(frames)
    path.write_bytes(whole)
    assert [raw for _, raw in read_journal(path)] == payloads
    assert numbers(path, len(frames[0])) == [1, 2]
    path.write_bytes(whole[:-3])
    assert numbers(path) == [0, 1]
    path.write_bytes(whole[:30] + b"?" + whole[31:])
    with pytest.raises(RecordError, match="damaged"):
        numbers(path)
    with pytest.raises(RecordError, match=r"format version 1, which this release reads but does"):
        Journal(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    later = struct.pack("<8sIQ", b"ASUBJRNL", 3, 0)
    later += struct.pack("<I", zlib.crc32(later))
    for i, content in enumerate((b"hello", b"x" * 100, later)):
        path = tmp_path / f"{i}"
        path.write_bytes(content)
        with pytest.raises(RecordError, match=r"not a journal|version 3"):
            Journal(path)
        with pytest.raises(RecordError, match=r"not a journal|version 3"):
            numbers(path)
        assert path.read_bytes() == content


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    assert has_writer(tmp_path / "journal")
    with pytest.raises(RecordError, match="another process"):
        Journal(tmp_path / "journal")
    journal.close()
    assert not has_writer(tmp_path / "journal")
    with pytest.raises(RecordError, match="closed"):
        journal.append(record(0))
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
    (file,) = segment_files(path)
    assert file.stat().st_size == HEADER.size + journal.end
    journal.append(record(2))
    journal.close()
    assert numbers(path) == [0, 2]


@pytest.mark.parametrize("victim", range(8))  # a write of a record or of a segment's header
def test_a_writer_killed_in_the_middle_of_a_write_loses_only_that_record(
    tmp_path: Path, victim: int
) -> None:
    path = tmp_path / "journal"
    code = (
        "import itertools, os, signal, sys\n"
        "from pathlib import Path\n"
        "from test_journal import SMALL, record\n"
        "from areal_sub.trajectory.journal import Journal\n"
        "real, calls = os.pwrite, itertools.count()\n"
        "def pwrite(fd, data, offset):\n"
        "    if next(calls) == int(sys.argv[2]):\n"
        "        real(fd, bytes(data)[: len(data) // 2], offset)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(fd, data, offset)\n"
        "os.pwrite = pwrite\n"
        "journal = Journal(Path(sys.argv[1]), SMALL)\n"
        "for number in range(20):\n"
        "    journal.append(record(number))\n"
        "    print(number, flush=True)\n"
    )
    command = [sys.executable, "-c", code, str(path), str(victim)]
    done = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    appended = [int(line) for line in done.stdout.split()]
    assert numbers(path) == appended
    again = Journal(path, SMALL)
    again.append(record(99))
    again.close()
    assert numbers(path) == [*appended, 99]


def test_a_segment_that_cannot_be_begun_is_an_error_and_the_next_append_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, SMALL)
    journal.append(record(0))
    journal.append(record(1, 200))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda fd, data, offset: 0)
        with pytest.raises(RecordError, match="no space"):
            journal.append(record(2))
    assert len(segment_files(path)) == 1
    journal.append(record(3))
    journal.close()
    assert numbers(path) == [0, 1, 3] and len(segment_files(path)) == 2


@pytest.mark.parametrize(
    ("fsync", "synced"), [("never", []), ("end", ["end"]), ("always", ["open", "end"])]
)
def test_what_is_synced_when(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsync: str, synced: list[str]
) -> None:
    journal = Journal(tmp_path / "journal", JournalPolicy(fsync=fsync))  # type: ignore[arg-type]
    seen: list[str] = []
    now = ""
    monkeypatch.setattr(os, "fdatasync", lambda fd: seen.append(now))
    for each in (record(0), end("r0")):
        now = each.KIND
        journal.append(each)
    journal.close()
    assert seen == synced


def test_only_what_is_acknowledged_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, JournalPolicy(segment_bytes=150, retain_bytes=710))
    offsets = [journal.append(record(i)) for i in range(12)]
    assert len(segment_files(path)) == 6 and journal.begin == 0
    journal.acknowledge(offsets[2])  # in the middle of the second segment
    assert numbers(path) == list(range(2, 12))
    journal.acknowledge(offsets[10])
    assert journal.begin == offsets[5] == journal_begin(path)
    assert journal.end - journal.begin <= 750 and numbers(path) == list(range(6, 12))

    async def first() -> int:
        items = journal.follow(0)
        _, batch = await anext(items)
        with pytest.raises(RecordError, match="no offset"):
            await anext(journal.follow(offsets[2]))
        await items.aclose()  # type: ignore[attr-defined]
        return decode_record(batch[0]).policy_version  # type: ignore[union-attr]

    assert asyncio.run(first()) == 6
    journal.close()
    again = Journal(path, JournalPolicy(segment_bytes=150, retain_bytes=0))
    assert numbers(path) == list(range(6, 12))  # its reader has not told it what it has done with
    again.acknowledge(10**9)
    assert numbers(path) == [10, 11]  # the last segment is written to
    again.close()


def test_old_segments_go_by_age(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, JournalPolicy(segment_bytes=150, retain_age_s=3600))
    for i in range(6):
        journal.append(record(i))
    journal.acknowledge(journal.end)
    assert journal.begin == 0
    os.utime(segment_files(path)[0], (0, 0))
    journal.acknowledge(journal.end)
    assert numbers(path) == [2, 3, 4, 5]
    journal.close()


def test_following_in_bounded_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "BATCH_BYTES", 1000)
    journal = Journal(tmp_path / "journal", JournalPolicy(segment_bytes=12_000))
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
            await read(1, 1)

    asyncio.run(asyncio.wait_for(work(), 20))
    journal.close()
