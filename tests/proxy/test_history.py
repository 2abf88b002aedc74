"""Which turn a call continues, and the cause where it continues none."""

from __future__ import annotations

from typing import Any

import pytest

from areal_sub.proxy.history import (
    MAX_LATELY_CHARS,
    NUM_LATELY,
    History,
    Keys,
    Match,
    Prompt,
    Turn,
)
from areal_sub.proxy.neutral import Message, ToolCall
from areal_sub.records import Fork, int32

S, U, T = Message("system", "Be brief."), Message("user", "7*8?"), Message("tool", "56")
A, B = Message("assistant", "calling"), Message("assistant", "56.")
U2 = Message("user", "Sure?")
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "calc"}}


class Rollout:
    """Calls as `turns.py` makes them, one token each."""

    def __init__(self) -> None:
        self.history = History()
        self.num_turns = 0

    def match(self, messages: list[Message], tools: list[dict[str, Any]]) -> tuple[Match, Keys]:
        keys = self.history.keys(messages, tools)
        assert keys == Keys.of(messages, tools)
        return self.history.match(messages, keys), keys

    def ask(
        self, *messages: Message, answer: Message, tools: list[dict[str, Any]] | None = None
    ) -> Turn:
        matched, keys = self.match(list(messages), tools or [])
        prompt = matched.twin or Prompt(
            parent=matched.parent,
            fork=matched.fork,
            context=int32([len(messages)]),
            num_tokens=1,
            tools=keys.tools,
            chain=keys.chain[-1],
            exact=keys.exact[-1],
            bare=keys.bare[-1],
            system=keys.system,
            num_messages=len(messages),
            continues=matched.continues,
        )
        prompt = self.history.add_prompt(messages, keys, prompt, matched)
        self.num_turns += 1
        turn_id = f"t{self.num_turns}"
        return self.history.add_turn(turn_id, prompt, int32([100 + self.num_turns]), answer)


@pytest.mark.parametrize(
    ("messages", "tools", "fork", "parent"),
    [
        ([S, U, A, T, B, U2], [], Fork.NONE, "t2"),
        ([S, U, A, T, B], [], Fork.NONE, "t2"),
        ([S, U, A, U2], [], Fork.NONE, "t1"),  # another way on from the first turn
        ([S, U], [], Fork.RESAMPLE, None),
        ([S, U, A, T], [], Fork.RESAMPLE, "t1"),
        ([S, U, A, T, B, U2], [TOOL], Fork.TOOLS_CHANGED, None),
        ([S, U], [TOOL], Fork.TOOLS_CHANGED, None),
        ([Message("system", "Be long."), U, A, U2], [], Fork.SYSTEM_CHANGED, None),
        ([U, A, T, B, U2], [], Fork.SYSTEM_CHANGED, None),
        ([S, U2], [], Fork.NEW_CONVERSATION, None),
        ([Message("system", "You title."), U2], [], Fork.SUB_AGENT, None),
        ([S, Message("user", "8*8?"), A, T], [], Fork.HISTORY_EDITED, None),
        ([S, U, Message("assistant", "else"), U2], [], Fork.ASSISTANT_EDITED, None),
        ([S, U, U2], [], Fork.ASSISTANT_EDITED, None),
        ([S, U, A, T, Message("assistant", "57."), U2], [], Fork.ASSISTANT_EDITED, "t1"),
        ([S], [], Fork.NEW_CONVERSATION, None),
    ],
)
def test_causes(
    messages: list[Message], tools: list[dict[str, Any]], fork: Fork, parent: str | None
) -> None:
    rollout = Rollout()
    assert rollout.ask(S, U, answer=A).prompt.fork is Fork.ROOT
    assert rollout.ask(S, U, A, T, answer=B).prompt.fork is Fork.NONE
    match, _ = rollout.match(messages, tools)
    assert match.fork is fork
    assert (match.parent.turn_id if match.parent else None) == parent


def test_an_edit_behind_a_turn_keeps_what_is_shared() -> None:
    rollout = Rollout()
    rollout.ask(S, U, answer=A)
    rollout.ask(S, U, A, T, U2, answer=B)
    match, _ = rollout.match([S, U, A, T, Message("user", "other")], [])
    assert (match.fork, match.num_history) == (Fork.HISTORY_EDITED, 3)
    assert match.parent is not None


def test_a_conversation_that_is_had_twice_goes_on_from_its_own_answers() -> None:
    """As a policy that is sure of itself makes it: each answer is the same again."""
    rollout = Rollout()
    for num_before in (0, 3):
        rollout.ask(S, U, answer=A)
        for messages in ([S, U, A, T], [S, U, A, T, B, U2]):
            turn = rollout.ask(*messages, answer=B)
            assert turn.prompt.fork is Fork.NONE
            assert turn.prompt.parent is not None
            assert int(turn.prompt.parent.turn_id[1:]) > num_before


def test_spelling_does_not_matter() -> None:
    rollout = Rollout()
    said = Message("assistant", "Hm. \n", (ToolCall("c1", "calc", '{"a": 1, "b": [2]}'),))
    rollout.ask(U, answer=said)
    sent = Message("assistant", "Hm.", (ToolCall("other", "calc", '{"b":[2],"a":1}'),))
    assert rollout.match([U, sent, T], [])[0].fork is Fork.NONE
    other = Message("assistant", "Hm.", (ToolCall("c1", "calc", '{"b":[2],"a":2}'),))
    assert rollout.match([U, other, T], [])[0].fork is Fork.ASSISTANT_EDITED
    # White space of what we did not sample is not ours to ignore.
    assert rollout.match([Message("user", "7*8? "), said, T], [])[0].fork is not Fork.NONE


def test_ids_decide_between_siblings_with_the_same_text() -> None:
    rollout = Rollout()

    def call(call_id: str) -> Message:
        return Message("assistant", "", (ToolCall(call_id, "calc", "{}"),))

    def result(call_id: str) -> Message:
        return Message("tool", "56", tool_call_id=call_id)

    for call_id in ("c1", "c2", "c3"):
        rollout.ask(U, answer=call(call_id))
    for call_id, parent in (("c1", "t1"), ("c2", "t2"), ("unknown", "t3")):
        match, _ = rollout.match([U, call(call_id), result(call_id)], [])
        assert match.parent is not None
        assert (match.parent.turn_id, match.fork) == (parent, Fork.NONE)
        # Going on from one is no repetition of going on from another.
        assert rollout.ask(U, call(call_id), result(call_id), answer=B).prompt.parent is not None
    match, _ = rollout.match([U, call("c2"), result("c2"), B, U2], [])
    assert match.parent is not None
    assert match.parent.prompt.parent is not None
    assert match.parent.prompt.parent.turn_id == "t2"


SUMMARY = "The user wants 7*8 computed; the tool said 56."
ASK = Message("user", "Sum this up.")
TOLD = Message("user", f"So far: {SUMMARY} Go on.")


@pytest.mark.parametrize(
    ("messages", "tools", "fork", "continues"),
    [
        ([S, TOLD], [], Fork.COMPACTED, "t3"),  # a new conversation that quotes the last answer
        ([S, U, TOLD], [], Fork.COMPACTED, "t3"),  # what the user said was kept
        ([S, Message("user", "Before: all is well."), B, U2], [], Fork.COMPACTED, "t2"),
        ([S, TOLD, Message("user", "x" * 262_144)], [], Fork.NEW_CONVERSATION, None),
        ([S, TOLD], [TOOL], Fork.NEW_CONVERSATION, None),  # with other tools it is another agent
        ([Message("system", "You check."), TOLD], [], Fork.SUB_AGENT, None),
        ([S, A, T, B, U2], [], Fork.HISTORY_EDITED, "t2"),  # dropped, with nothing in its place
        ([Message("system", "Be long."), U, A, U2], [], Fork.SYSTEM_CHANGED, "t1"),
        ([S, U, Message("assistant", "else"), U2], [], Fork.ASSISTANT_EDITED, "t1"),
        ([S, U, A, T], [TOOL], Fork.TOOLS_CHANGED, "t1"),
        ([S, U, A, U2], [], Fork.NONE, None),
    ],
)
def test_where_a_conversation_goes_on_that_its_tokens_do_not(
    messages: list[Message], tools: list[dict[str, Any]], fork: Fork, continues: str | None
) -> None:
    rollout = Rollout()
    rollout.ask(S, U, answer=A)
    rollout.ask(S, U, A, T, answer=B)
    rollout.ask(S, U, A, T, B, ASK, answer=Message("assistant", SUMMARY))
    match, _ = rollout.match(messages, tools)
    assert match.fork is fork
    assert (match.continues.turn_id if match.continues else None) == continues


def test_a_summary_may_be_made_by_another_agent_and_marked() -> None:
    rollout = Rollout()
    rollout.ask(S, U, answer=A)
    rollout.ask(S, U, A, T, answer=B)
    said = Message("assistant", f"Let me think. <summary>{SUMMARY}</summary>")
    asked = rollout.ask(Message("system", "You sum up."), U, A, T, B, ASK, answer=said)
    assert asked.prompt.fork is Fork.SYSTEM_CHANGED
    match, _ = rollout.match([S, TOLD], [])
    assert match.continues is not None
    assert (match.fork, match.continues.turn_id) == (Fork.COMPACTED, "t2")


def test_prompt_tokens_are_the_branch() -> None:
    rollout = Rollout()
    rollout.ask(S, U, answer=A)
    turn = rollout.ask(S, U, A, T, answer=B)
    last = rollout.ask(S, U, A, T, B, U2, answer=A)
    assert turn.prompt.token_ids().tolist() == [2, 101, 4]
    assert last.prompt.token_ids().tolist() == [2, 101, 4, 102, 6]


def test_reasoning_is_part_of_an_answer() -> None:
    rollout = Rollout()
    rollout.ask(U, answer=Message("assistant", "calling", reasoning="hm"))
    kept = Message("assistant", "calling", reasoning=" hm\n")
    rollout.ask(U, kept, T, answer=Message("assistant", "56.", reasoning="so"))
    for messages, fork, parent, bare in (
        ([U, kept, U2], Fork.NONE, "t1", None),
        ([U, A, U2], Fork.REASONING_DROPPED, None, "t1"),
        (
            [U, Message("assistant", "calling", reasoning="no"), U2],
            Fork.REASONING_DROPPED,
            None,
            "t1",
        ),
        ([U, A, T, B, U2], Fork.REASONING_DROPPED, None, "t2"),
        ([U, kept, T, B, U2], Fork.REASONING_DROPPED, "t1", "t2"),
        ([U, Message("assistant", "else"), U2], Fork.ASSISTANT_EDITED, None, None),
    ):
        match, _ = rollout.match(messages, [])
        assert match.fork is fork
        assert (match.parent.turn_id if match.parent else None) == parent
        assert (match.bare.turn_id if match.bare else None) == bare
    assert rollout.match([U, A, U2], [TOOL])[0].fork is Fork.REASONING_DROPPED


def test_the_name_in_a_result_or_on_an_answer_does_not_matter() -> None:
    rollout = Rollout()
    rollout.ask(U, answer=A)
    rollout.ask(U, A, T, answer=B)
    result, named = Message("tool", "56", name="calc"), Message("assistant", "56.", name="solver")
    match, _ = rollout.match([U, A, result, named, U2], [])
    assert match.fork is Fork.NONE
    match, _ = rollout.match([Message("user", "7*8?", name="bob"), A, T], [])
    assert match.fork is Fork.HISTORY_EDITED


def test_prompts_of_tokens_continue_the_longest_turn_that_they_begin_with() -> None:
    history = History()

    def asked(token_ids: Any) -> Any:
        return history.add_raw(history.raw_prompt(token_ids))

    first = asked(int32([1, 2]))
    assert (first.fork, first.parent) == (Fork.ROOT, None)
    turn = history.add_turn("t1", first, int32([3]), A)
    assert asked(int32([1, 2])) is first
    second = asked(int32([1, 2, 3, 4]))
    assert (second.fork, second.parent, second.context.tolist()) == (Fork.NONE, turn, [4])
    last = history.add_turn("t2", second, int32([5, 6]), B)
    third = asked(int32([1, 2, 3, 4, 5, 6]))
    assert (third.parent, third.context.tolist(), third.num_tokens) == (last, [], 6)
    assert third.token_ids().tolist() == [1, 2, 3, 4, 5, 6]
    other = asked(int32([2, 1, 3, 4]))
    assert (other.fork, other.parent) == (Fork.NEW_CONVERSATION, None)
    edited = asked(int32([1, 2, 3, 4, 7]))
    assert (edited.fork, edited.parent) == (Fork.ASSISTANT_EDITED, turn)
    edited = asked(int32([1, 2, 9, 4]))
    assert (edited.fork, edited.parent) == (Fork.ASSISTANT_EDITED, None)


def test_what_was_sent_lately_is_bounded() -> None:
    rollout = Rollout()
    for number in range(10):
        rollout.match([S, Message("user", str(number))], [])
    assert len(rollout.history._lately) == NUM_LATELY
    rollout.match([Message("user", "x" * (MAX_LATELY_CHARS + 1))], [])
    assert all(len(messages) == 2 for messages, _ in rollout.history._lately)
