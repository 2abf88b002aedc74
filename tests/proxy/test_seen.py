"""Only what is new is parsed, and what only looks the same is new."""

from __future__ import annotations

from typing import Any

import pytest

from areal_sub.proxy.seen import MAX_BYTES, MAX_CALLS, Seen

PARSED: list[Any] = []


def parse(item: Any, index: int) -> tuple[Any, int]:
    PARSED.append(item)
    if item == "bad":
        raise ValueError(index)
    return item, index


def other(item: Any, index: int) -> str:
    return f"{item}-{index}"


def parsed_anew(seen: Seen, items: list[Any]) -> list[Any]:
    PARSED.clear()
    assert seen.parsed(items, parse) == [(item, i) for i, item in enumerate(items)]
    return list(PARSED)


def test_only_what_is_new_is_parsed() -> None:
    seen = Seen()
    assert parsed_anew(seen, ["a", "b"]) == ["a", "b"]
    assert parsed_anew(seen, ["a", "b", "c"]) == ["c"]
    assert parsed_anew(seen, ["a", "x", "c"]) == ["x", "c"]
    assert parsed_anew(seen, ["a", "b", "c", "d"]) == ["d"]
    assert seen.parsed(["a"], other) == ["a-0"], "another dialect's items are others"


@pytest.mark.parametrize("changed", [{"x": True}, {"x": 1.0}, {"x": "1"}, {"x": 1, "y": None}])
def test_what_python_takes_for_equal_is_not_the_same(changed: Any) -> None:
    seen = Seen()
    parsed_anew(seen, [{"x": 1}])
    assert [repr(item) for item in parsed_anew(seen, [changed])] == [repr(changed)]


def test_what_cannot_be_parsed_is_not_remembered() -> None:
    seen = Seen()
    for _ in range(2):
        PARSED.clear()
        with pytest.raises(ValueError, match="1"):
            seen.parsed(["a", "bad"], parse)
        assert PARSED == ["a", "bad"]


def test_it_is_bounded() -> None:
    seen = Seen()
    for number in range(10 * MAX_CALLS):
        parsed_anew(seen, [f"other {number}"])
    assert len(seen._calls) == MAX_CALLS
    large = ["x" * MAX_BYTES]
    parsed_anew(seen, large)
    assert parsed_anew(seen, large) == large
