"""Only what is new is read, and what only looks the same is new."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wires import WIRES

from areal_sub.proxy.dialects import Asked, gemini, responses
from areal_sub.proxy.dialects.transcript import Transcript
from areal_sub.proxy.kept import Kept, KeptAnswers
from areal_sub.proxy.neutral import Message, ToolCall
from areal_sub.proxy.refusals import Refusal
from areal_sub.proxy.seen import MAX_BYTES, MAX_CALLS, Seen


class Reader(Transcript):
    """Items that begin with "+" are pieces of a message that goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.state = 0  # messages that were whole at once
        self.was_read: list[Any] = []

    def read(self, item: Any, index: int) -> None:
        self.was_read.append(item)
        if item == "bad":
            raise ValueError(index)
        if str(item).startswith("+"):
            self.say(item)
        else:
            self.state += 1
            self.add(Message("user", f"{item!r} at {index}, number {self.state}"))


class Other(Reader):
    pass


def read_anew(seen: Seen, items: list[Any], new: Callable[[], Reader] = Reader) -> list[Any]:
    """What `seen` has read of `items`, which is the same as without it."""
    reader, fresh = new(), new()
    assert seen.read(items, reader) == Seen().read(items, fresh)
    assert reader.state == fresh.state
    return reader.was_read


def test_only_what_is_new_is_read() -> None:
    seen = Seen()
    assert read_anew(seen, ["a", "b"]) == ["a", "b"]
    assert read_anew(seen, ["a", "b", "c"]) == ["c"]
    assert read_anew(seen, ["a", "x", "c"]) == ["x", "c"]
    assert read_anew(seen, ["a", "b", "c", "d"]) == ["d"]
    assert read_anew(seen, ["a"], Other) == ["a"], "another dialect's items are others"


def test_reading_goes_on_where_a_message_ends() -> None:
    seen = Seen()
    read_anew(seen, ["a", "+b", "+c", "d", "+e"])
    assert read_anew(seen, ["a", "+b", "+c", "d", "+e", "f"]) == ["+e", "f"]
    assert read_anew(seen, ["a", "+b", "+x"]) == ["+b", "+x"]
    assert read_anew(seen, ["a", "+b"]) == ["+b"]


@given(calls=st.lists(st.lists(st.sampled_from(["a", "b", "+c", "+d"]), max_size=6), max_size=8))
def test_whatever_came_before_changes_nothing(calls: list[list[str]]) -> None:
    seen = Seen()
    for items in calls:
        read_anew(seen, items)


@pytest.mark.parametrize("changed", [{"x": True}, {"x": 1.0}, {"x": "1"}, {"x": 1, "y": None}])
def test_what_python_takes_for_equal_is_not_the_same(changed: Any) -> None:
    seen = Seen()
    read_anew(seen, [{"x": 1}])
    assert [repr(item) for item in read_anew(seen, [changed])] == [repr(changed)]


def test_what_cannot_be_read_is_not_remembered() -> None:
    seen = Seen()
    for _ in range(2):
        reader = Reader()
        with pytest.raises(ValueError, match="1"):
            seen.read(["a", "bad"], reader)
        assert reader.was_read == ["a", "bad"]


def test_it_is_bounded() -> None:
    seen = Seen()
    for number in range(10 * MAX_CALLS):
        read_anew(seen, [f"other {number}"])
    assert len(seen._calls) == MAX_CALLS
    large = ["x" * MAX_BYTES]
    read_anew(seen, large)
    assert read_anew(seen, large) == large


@pytest.mark.parametrize("wire", WIRES, ids=lambda wire: wire.dialect.NAME)
def test_a_dialect_reads_its_history_once(wire: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[Message] = []
    add = Transcript.add

    def counted(self: Transcript, message: Message) -> None:
        added.append(message)
        add(self, message)

    monkeypatch.setattr(Transcript, "add", counted)
    seen, said = Seen(), []
    for turn in range(5):
        call = ToolCall(f"call_{turn}", "calc", '{"x":1}')
        said += [("user", f"q{turn}"), ("assistant", ["hm", call]), ("tool", call, "4")]
        asked = wire.asked(said, True, False)
        added.clear()
        read = wire.dialect.parse(Asked(asked.raw, asked.path, seen=seen)).messages
        # Of each turn: what is asked, and what the tool gave; chat's answers are items, too.
        assert [m.content for m in added if m.role != "assistant"] == [f"q{turn}", "4"]
        assert read == wire.dialect.parse(asked).messages


def test_results_are_of_the_calls_that_are_open() -> None:
    """Where Gemini's results do not say of which call they are, the calls before count."""

    def asked(*contents: Any) -> Asked:
        raw = json.dumps({"contents": contents}).encode()
        return Asked(raw, {"target": "m:generateContent"}, seen=seen)

    def called(*ids: str) -> Any:
        parts = [{"functionCall": {"name": "f", **({"id": i} if i else {})}} for i in ids]
        return {"role": "model", "parts": parts}

    result = {"parts": [{"functionResponse": {"name": "f", "response": {}}}]}
    seen = Seen()
    for num in (1, 2, 3):
        contents = [called("x", ""), *[result] * num]
        answered = [m.tool_call_id for m in gemini.parse(asked(*contents)).messages[1:]]
        assert answered == ["x", "call_2", ""][:num]
    contents = [called("x", ""), result, called("", "y"), result]
    assert [m.tool_call_id for m in gemini.parse(asked(*contents)).messages[1::2]] == [
        "x",
        "call_2",
    ]


def test_a_reference_holds_as_long_as_its_answer() -> None:
    item = {"id": "msg_1_0", "type": "message", "role": "assistant", "content": "hm"}
    kept, seen = KeptAnswers(), Seen()
    kept.add("resp_1", Kept((), json.dumps({"output": [item]}).encode(), 1))
    items = [{"type": "item_reference", "id": "msg_1_0"}, {"role": "user", "content": "x"}]
    asked = Asked(json.dumps({"input": items}).encode(), kept=kept, seen=seen)
    for _ in range(2):
        assert [m.content for m in responses.parse(asked).messages] == ["hm", "x"]
    kept.remove("resp_1")
    with pytest.raises(Refusal, match="'msg_1_0' not found"):
        responses.parse(asked)


def pieces(num_contents: int) -> dict[str, Any]:
    answer = {"role": "model", "parts": [{"text": "x" * 8_000_000}]}
    more = {"role": "model", "parts": [{"text": "x"}] * 1000}
    return {"contents": [answer, *[more] * num_contents, {"parts": [{"text": "x"}]}]}


def calls(num_contents: int) -> dict[str, Any]:
    called = {"role": "model", "parts": [{"functionCall": {"name": "a"}}] * 100}
    result = {"parts": [{"functionResponse": {"name": "b"}}] * 100}
    return {"contents": [called, result] * num_contents}


@pytest.mark.parametrize("body", [pieces(20), calls(200)], ids=["pieces", "calls"])
def test_a_history_in_many_pieces_takes_no_time(body: Any) -> None:
    asked = Asked(json.dumps(body).encode(), {"target": "m:generateContent"})
    began_at = time.process_time()
    gemini.parse(asked)
    assert time.process_time() - began_at < 2, "it takes seconds where each piece looks at all"
