"""The wire form of every record, byte for byte, per kind and version.

The golden bytes never change: journals that hold them exist. What a record grows by is appended
to them, and the old ones must still be read.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import msgpack
import numpy as np
import pytest

from areal_sub.errors import RecordError
from areal_sub.records import (
    EndRecord,
    EngineInfo,
    Fork,
    GenerateChunk,
    GenerateRequest,
    OpenRecord,
    Outcome,
    RunReport,
    RunRequest,
    TurnRecord,
    decode_record,
    encode_record,
    float32,
    int32,
)

OPEN = OpenRecord(
    rollout_id="r1", group_id="g1", task_id="t1", split="train", policy_version=3, opened_at=1.5
)
TURN = TurnRecord(
    rollout_id="r1",
    turn_id="chatcmpl-1",
    parent_turn_id=None,
    fork=Fork.ROOT,
    context_token_ids=int32([1, 2]),
    token_ids=int32([3, 65536]),
    rollout_logprobs=float32([-0.5, -1.0]),
    versions=int32([3, 4]),
    finish_reason="stop",
    dialect="chat",
    model="m",
    temperature=1.0,
    top_p=1.0,
    started_at=1.5,
    ended_at=2.5,
    num_prompt_tokens=2,
)
END = EndRecord(
    rollout_id="r1",
    outcome=Outcome.COMPLETED,
    reward=1.0,
    turn_rewards={"chatcmpl-1": 0.5},
    error="",
    traceback="",
    stdout_tail="out",
    stderr_tail="",
    wall_s=2.0,
    cpu_s=1.0,
    max_rss_bytes=1024,
    num_turns=1,
    num_rejected_calls=0,
    ended_at=3.5,
    egress_refused={"a.b:443": 2},
    written_bytes=4096,
)
RECORDS: list[Any] = [
    OPEN,
    TURN,
    END,
    GenerateRequest(
        prompt_token_ids=int32([1, 2]),
        max_new_tokens=8,
        temperature=0.5,
        stop_token_ids=[2],
        affinity="r1",
    ),
    GenerateChunk(
        token_ids=int32([7]), logprobs=float32([-0.5]), versions=int32([3]), finish_reason=None
    ),
    EngineInfo(
        policy_version=3,
        max_model_len=4096,
        vocab_size=352,
        num_slots=64,
        num_running=1,
        num_waiting=0,
        num_generated_tokens=10,
        num_decode_steps=9,
    ),
    RunRequest(
        rollout_id="r1",
        target="a.b:C",
        pickled=b"",
        workflow_kwargs={"k": 1},
        data={"q": "?"},
        env={"A": "b"},
        timeout_s=5.0,
        workspace="/tasks/t1",
        outputs=["out"],
    ),
    RunReport(
        rollout_id="r1",
        outcome=Outcome.TIMEOUT,
        result=None,
        error="e",
        traceback="",
        stdout_tail="",
        stderr_tail="",
        exit_code=None,
        signal=9,
        wall_s=5.0,
        cpu_s=0.5,
        max_rss_bytes=1024,
        num_killed=2,
        egress_refused={"a.b:443": 2},
        written_bytes=4096,
        outputs={"out": b"\0"},
        outputs_refused=[["link", "it is a symbolic link"]],
        outputs_missing=["none"],
    ),
]
BEFORE = {
    # Written before fields were appended; each must still be read, with their defaults.
    "end": (
        "de0010a46b696e64a3656e64a17601aa726f6c6c6f75745f6964a27231a76f7574636f6d65a9636f"
        "6d706c65746564a6726577617264cb3ff0000000000000ac7475726e5f7265776172647381aa6368"
        "6174636d706c2d31cb3fe0000000000000a56572726f72a0a974726163656261636ba0ab7374646f"
        "75745f7461696ca36f7574ab7374646572725f7461696ca0a677616c6c5f73cb4000000000000000"
        "a56370755f73cb3ff0000000000000ad6d61785f7273735f6279746573cd0400a96e756d5f747572"
        "6e7301b26e756d5f72656a65637465645f63616c6c7300a8656e6465645f6174cb400c0000000000"
        "00"
    ),
    "run": (
        "89a46b696e64a372756ea17601aa726f6c6c6f75745f6964a27231a6746172676574a5612e623a43"
        "a77069636b6c6564c400af776f726b666c6f775f6b776172677381a16b01a46461746181a171a13f"
        "a3656e7681a141a162a974696d656f75745f73cb4014000000000000"
    ),
    "report": (
        "8fa46b696e64a67265706f7274a17601aa726f6c6c6f75745f6964a27231a76f7574636f6d65a774"
        "696d656f7574a6726573756c74c0a56572726f72a165a974726163656261636ba0ab7374646f7574"
        "5f7461696ca0ab7374646572725f7461696ca0a9657869745f636f6465c0a67369676e616c09a677"
        "616c6c5f73cb4014000000000000a56370755f73cb3fe0000000000000ad6d61785f7273735f6279"
        "746573cd0400aa6e756d5f6b696c6c656402"
    ),
}
GOLDEN = {
    ("open", 1): (
        "88a46b696e64a46f70656ea17601aa726f6c6c6f75745f6964a27231a867726f75705f6964a26731"
        "a77461736b5f6964a27431a573706c6974a5747261696eae706f6c6963795f76657273696f6e03a9"
        "6f70656e65645f6174cb3ff8000000000000"
    ),
    ("turn", 1): (
        "de0013a46b696e64a47475726ea17601aa726f6c6c6f75745f6964a27231a77475726e5f6964aa63"
        "686174636d706c2d31ae706172656e745f7475726e5f6964c0a4666f726ba4726f6f74b1636f6e74"
        "6578745f746f6b656e5f696473c4080100000002000000a9746f6b656e5f696473c4080300000000"
        "000100b0726f6c6c6f75745f6c6f6770726f6273c408000000bf000080bfa876657273696f6e73c4"
        "080300000004000000ad66696e6973685f726561736f6ea473746f70a76469616c656374a4636861"
        "74a56d6f64656ca16dab74656d7065726174757265cb3ff0000000000000a5746f705f70cb3ff000"
        "0000000000aa737461727465645f6174cb3ff8000000000000a8656e6465645f6174cb4004000000"
        "000000b16e756d5f70726f6d70745f746f6b656e7302ad656e67696e655f64696765737400"
    ),
    ("end", 1): (
        "de0012a46b696e64a3656e64a17601aa726f6c6c6f75745f6964a27231a76f7574636f6d65a9636f"
        "6d706c65746564a6726577617264cb3ff0000000000000ac7475726e5f7265776172647381aa6368"
        "6174636d706c2d31cb3fe0000000000000a56572726f72a0a974726163656261636ba0ab7374646f"
        "75745f7461696ca36f7574ab7374646572725f7461696ca0a677616c6c5f73cb4000000000000000"
        "a56370755f73cb3ff0000000000000ad6d61785f7273735f6279746573cd0400a96e756d5f747572"
        "6e7301b26e756d5f72656a65637465645f63616c6c7300a8656e6465645f6174cb400c0000000000"
        "00ae6567726573735f7265667573656481a7612e623a34343302ad7772697474656e5f6279746573"
        "cd1000"
    ),
    ("generate", 1): (
        "8aa46b696e64a867656e6572617465a17601b070726f6d70745f746f6b656e5f696473c408010000"
        "0002000000ae6d61785f6e65775f746f6b656e7308ab74656d7065726174757265cb3fe000000000"
        "0000a5746f705f70cb3ff0000000000000a5746f705f6b00ae73746f705f746f6b656e5f69647391"
        "02a673747265616dc2a8616666696e697479a27231"
    ),
    ("chunk", 1): (
        "87a46b696e64a56368756e6ba17601a9746f6b656e5f696473c40407000000a86c6f6770726f6273"
        "c404000000bfa876657273696f6e73c40403000000ad66696e6973685f726561736f6ec0a7646967"
        "65737473c400"
    ),
    ("engine_info", 1): (
        "8aa46b696e64ab656e67696e655f696e666fa17601ae706f6c6963795f76657273696f6e03ad6d61"
        "785f6d6f64656c5f6c656ecd1000aa766f6361625f73697a65cd0160a96e756d5f736c6f747340ab"
        "6e756d5f72756e6e696e6701ab6e756d5f77616974696e6700b46e756d5f67656e6572617465645f"
        "746f6b656e730ab06e756d5f6465636f64655f737465707309"
    ),
    ("run", 1): (
        "8ba46b696e64a372756ea17601aa726f6c6c6f75745f6964a27231a6746172676574a5612e623a43"
        "a77069636b6c6564c400af776f726b666c6f775f6b776172677381a16b01a46461746181a171a13f"
        "a3656e7681a141a162a974696d656f75745f73cb4014000000000000a9776f726b7370616365a92f"
        "7461736b732f7431a76f75747075747391a36f7574"
    ),
    ("report", 1): (
        "de0014a46b696e64a67265706f7274a17601aa726f6c6c6f75745f6964a27231a76f7574636f6d65"
        "a774696d656f7574a6726573756c74c0a56572726f72a165a974726163656261636ba0ab7374646f"
        "75745f7461696ca0ab7374646572725f7461696ca0a9657869745f636f6465c0a67369676e616c09"
        "a677616c6c5f73cb4014000000000000a56370755f73cb3fe0000000000000ad6d61785f7273735f"
        "6279746573cd0400aa6e756d5f6b696c6c656402ae6567726573735f7265667573656481a7612e62"
        "3a34343302ad7772697474656e5f6279746573cd1000a76f75747075747381a36f7574c40100af6f"
        "7574707574735f726566757365649192a46c696e6bb5697420697320612073796d626f6c6963206c"
        "696e6baf6f7574707574735f6d697373696e6791a46e6f6e65"
    ),
}
# What records have grown by since, with the defaults: behind the golden fields, in this order.
APPENDED: dict[str, dict[str, Any]] = {
    "turn": {
        "constrained": False,
        "answer_id": "",
        "retry": 0,
        "num_tools": 0,
        "continues_turn_id": None,
    },
    "generate": {"grammar": ""},
}


def packed(record: Any) -> bytes:
    raw: bytes = msgpack.packb(record.to_map(), use_bin_type=True)
    return raw


def same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and all(
        np.array_equal(getattr(one, f.name), getattr(other, f.name))
        for f in dataclasses.fields(one)
    )


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: str(record.KIND))
def test_golden_bytes(record: Any) -> None:
    golden = bytes.fromhex(GOLDEN[record.KIND, record.VERSION])
    assert packed(record) == msgpack.packb(
        {**msgpack.unpackb(golden), **APPENDED.get(record.KIND, {})}, use_bin_type=True
    )
    assert same(type(record).from_map(msgpack.unpackb(golden)), record)


@pytest.mark.parametrize("kind", BEFORE)
def test_bytes_from_before_a_field_was_appended_are_read(kind: str) -> None:
    (record,) = [each for each in RECORDS if kind == each.KIND]
    old = msgpack.unpackb(bytes.fromhex(BEFORE[kind]))
    appended = {f.name for f in dataclasses.fields(record)} - old.keys()
    assert appended
    defaults = {
        f.name: f.default_factory() if callable(f.default_factory) else f.default
        for f in dataclasses.fields(record)
        if f.name in appended
    }
    assert same(type(record).from_map(old), dataclasses.replace(record, **defaults))


@pytest.mark.parametrize("record", [OPEN, TURN, END], ids=lambda record: str(record.KIND))
def test_trajectory_records_come_back(record: Any) -> None:
    assert encode_record(record) == packed(record)
    back = decode_record(encode_record(record))
    assert same(back, record)
    assert type(getattr(back, "outcome", Outcome.COMPLETED)) is Outcome


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
