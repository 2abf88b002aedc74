"""Messages out of a child, as bytes: what is accepted, refused and cleaned."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.errors import ResultError
from sandbox.wire import (
    MAX_TEXT_CHARS,
    Result,
    Status,
    clean,
    decode_result,
    decode_status,
    encode_error,
    encode_status,
    encode_value,
    shorten,
)

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc"), inner, max_size=3),
    max_leaves=10,
)


@given(plain)
def test_every_json_value_comes_through_unchanged(value: object) -> None:
    assert decode_result(encode_value(value)) == Result(value=value)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_result_or_a_result_error(raw: bytes) -> None:
    try:
        decode_result(raw)
    except ResultError as error:
        assert str(error).isprintable()
    assert decode_status(raw) is None


@settings(max_examples=50)
@given(st.text(max_size=50))
def test_clean_text_is_encodable_and_obeyed_by_no_terminal(text: str) -> None:
    cleaned = clean(text)
    cleaned.encode()
    assert all(char.isprintable() or char in "\n\t" or char.isspace() for char in cleaned)
    assert "\x1b" not in cleaned
    assert clean(cleaned) == cleaned


def test_a_status_comes_through_and_a_forged_one_does_not() -> None:
    status = Status(exit_code=1, cpu_s=0.5, max_rss_bytes=10, num_killed=2, error="x")
    assert decode_status(encode_status(status)) == status
    honest = json.loads(encode_status(status))
    for forged in (
        {**honest, "cpu_s": "much"},
        {**honest, "cpu_s": float("nan")},
        {**honest, "num_killed": -1},
        {**honest, "num_killed": True},
        {**honest, "exit_code": 2**70},
        {**honest, "more": 1},
        {"exit_code": 1},
        [honest],
    ):
        assert decode_status(json.dumps(forged).encode()) is None


def test_long_texts_keep_both_ends() -> None:
    text = "begin" + "x" * 100_000 + "end"
    short = shorten(text, 100)
    assert short.startswith("begin")
    assert short.endswith("end")
    assert len(short) < 200
    message = decode_result(encode_error(ValueError(text), text))
    assert message.error is not None
    assert len(message.error) <= 1000
    assert len(message.traceback) <= MAX_TEXT_CHARS


def test_what_is_not_json_names_its_type() -> None:
    with pytest.raises(ResultError, match="an object of type set"):
        decode_result(encode_value({1}))
    with pytest.raises(ResultError, match=r"an object of type ndarray: array\(\[0.5, 1. \]\)"):
        decode_result(encode_value(np.array([0.5, 1.0])))
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(ResultError, match="nested"):
        decode_result(encode_value(endless))
