"""The wire form of every record, byte for byte, per kind.

`golden/KIND.py` holds a record of that kind and its `BYTES`, oldest first: the last as it is now,
before it what it was before fields were appended. Golden bytes never change and never go: journals
that hold them exist, and must still be read.
"""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from areal_sub import records
from areal_sub.errors import RecordError
from areal_sub.records import Outcome, decode_ledger_record, decode_record, encode_record

GOLDEN = {
    path.stem: runpy.run_path(str(path)) for path in Path(__file__).parent.glob("golden/*.py")
}
RECORDS: dict[str, Any] = {kind: golden["RECORD"] for kind, golden in GOLDEN.items()}
TRAJECTORY, LEDGER = list(records._KINDS), list(records._LEDGER_KINDS)
OPEN, TURN = RECORDS["open"], RECORDS["turn"]


def packed(record: Any) -> bytes:
    raw: bytes = msgpack.packb(record.to_map(), use_bin_type=True)
    return raw


def same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and all(
        np.array_equal(getattr(one, f.name), getattr(other, f.name))
        for f in dataclasses.fields(one)
    )


def test_every_kind_has_its_golden_bytes() -> None:
    assert set(GOLDEN) == {cls.KIND for cls in records._Record.__subclasses__()}
    assert all(kind == record.KIND for kind, record in RECORDS.items())


@pytest.mark.parametrize("kind", GOLDEN)
def test_golden_bytes(kind: str) -> None:
    golden, record = bytes.fromhex(GOLDEN[kind]["BYTES"][-1]), RECORDS[kind]
    assert packed(record).hex() == golden.hex()
    assert same(type(record).from_map(msgpack.unpackb(golden)), record)


@pytest.mark.parametrize(
    ("kind", "old"), [(kind, old) for kind in GOLDEN for old in GOLDEN[kind]["BYTES"][:-1]]
)
def test_bytes_from_before_a_field_was_appended_are_read(kind: str, old: str) -> None:
    record, map_ = RECORDS[kind], msgpack.unpackb(bytes.fromhex(old))
    appended = [f for f in dataclasses.fields(record) if f.name not in map_]
    assert appended
    assert list(record.to_map())[: len(map_)] == list(map_)
    defaults = {
        f.name: f.default_factory() if callable(f.default_factory) else f.default for f in appended
    }
    assert same(type(record).from_map(map_), dataclasses.replace(record, **defaults))


@pytest.mark.parametrize("kind", TRAJECTORY)
def test_trajectory_records_come_back(kind: str) -> None:
    record = RECORDS[kind]
    assert encode_record(record) == packed(record)
    back = decode_record(encode_record(record))
    assert same(back, record)
    assert type(getattr(back, "outcome", Outcome.COMPLETED)) is Outcome


@pytest.mark.parametrize("kind", LEDGER)
def test_ledger_records_come_back_and_are_no_trajectory_records(kind: str) -> None:
    record = RECORDS[kind]
    assert decode_ledger_record(encode_record(record)) == record
    with pytest.raises(RecordError, match=f"unknown record kind '{kind}'"):
        decode_record(encode_record(record))


def test_a_reader_takes_records_with_fields_that_it_does_not_know() -> None:
    raw = msgpack.packb({**OPEN.to_map(), "later": [1]})
    assert decode_record(raw) == OPEN


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not msgpack"),
        (b"\xc1", "not msgpack"),
        (packed(OPEN)[:-1], "not msgpack"),
        (packed(OPEN) + b"\0", "not msgpack"),
        (msgpack.packb(3), "unknown record kind 'int'"),
        (msgpack.packb({"kind": "other", "v": 1}), "unknown record kind 'other'"),
        (msgpack.packb({**OPEN.to_map(), "v": 2}), "version 2"),
        (msgpack.packb({**OPEN.to_map(), "v": "1"}), "version '1'"),
        (msgpack.packb({"kind": "open", "v": 1}), "lacks the field 'rollout_id'"),
        (msgpack.packb({**TURN.to_map(), "token_ids": b"123"}), "field 'token_ids'"),
        (msgpack.packb({**TURN.to_map(), "fork": "spoon"}), "field 'fork'"),
    ],
)
def test_what_is_no_record_is_refused_by_name(raw: bytes, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        decode_record(raw)
