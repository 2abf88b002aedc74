"""Why a tree branches, which answers were lost, which branch is the main one, what is trained."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollouts import STYLES, trajectory, turn

from areal_sub.records import Fork, Masked, TurnRecord
from areal_sub.trajectory.causes import before, causes, lost_answers, main_branch
from areal_sub.trajectory.samples import Credit, ExportStyle, rollout_samples

CREDITS: tuple[Credit, ...] = ("all", "main", "per_branch")


def call(
    turn_id: str,
    parent: TurnRecord | None = None,
    at: tuple[float, float] = (0, 0),
    context: int = 1,
    num: int = 1,
    **changes: Any,
) -> TurnRecord:
    """A turn that ran from `at[0]` to `at[1]`, and sampled `num` tokens."""
    made = turn(turn_id, parent, [context], list(range(num)))
    changes = {"answer_id": turn_id, "started_at": at[0], "ended_at": at[1], **changes}
    return dataclasses.replace(made, **changes)


def again(turn_id: str, of: TurnRecord, at: tuple[float, float], **changes: Any) -> TurnRecord:
    """The same call once more."""
    changes = {"fork": Fork.RESAMPLE, "answer_id": turn_id, "retry": 0, **changes}
    times = {"started_at": at[0], "ended_at": at[1]}
    return dataclasses.replace(of, turn_id=turn_id, **times, **changes)


A = call("a", at=(0, 1))
CUT = dataclasses.replace(A, finish_reason="aborted")


def test_a_retry_that_a_later_turn_extends_is_the_real_one() -> None:
    b = again("b", A, (1, 2), retry=1)
    c = call("c", b, (2, 3))
    whole = trajectory([A, b, c])
    assert lost_answers(whole) == {"a"}
    assert causes(whole) == {"a": Fork.LOST_ANSWER, "b": Fork.ROOT, "c": Fork.NONE}


def test_a_call_that_the_agent_went_on_from_was_not_lost() -> None:
    b = again("b", A, (1, 2), retry=1)
    assert lost_answers(trajectory([A, b, call("c", A, (2, 3))])) == frozenset()
    cut = again("b", A, (1, 2), retry=1, finish_reason="aborted")
    assert lost_answers(trajectory([A, cut, call("c", A, (2, 3))])) == {"b"}
    rewarded = trajectory([A, b], turn_rewards={"a": 1.0})
    assert lost_answers(rewarded) == frozenset()
    stripped = call("c", None, (2, 3), 7, fork=Fork.REASONING_DROPPED, continues_turn_id="a")
    assert lost_answers(trajectory([A, b, stripped])) == frozenset()


@pytest.mark.parametrize(
    ("turns", "lost"),
    [
        ([A, again("b", A, (1, 2), retry=1)], {"a"}),  # the last one answered in full
        ([A, again("b", A, (1, 2), retry=1, finish_reason="aborted")], {"b"}),
        ([CUT, again("b", A, (1, 2))], {"a"}),  # the agent's own way to call again
        ([CUT, again("b", CUT, (1, 2)), again("c", CUT, (2, 3))], {"a", "b"}),  # none came whole
        ([A, again("b", A, (1, 2), retry=1), again("c", A, (3, 4), retry=2)], {"a", "b"}),
        ([A, again("c", A, (3, 4), retry=2)], {"a"}),  # the attempt between was refused
        ([CUT], set()),  # nobody asked again
        ([A, again("b", A, (1, 2))], set()),  # on purpose: the first was answered in full
        ([A, again("b", A, (0.5, 2), retry=1)], set()),  # repeats something else: `a` was running
        ([A, again("b", A, (1, 2), retry=1, model="other")], set()),
        ([A, again("b", A, (1, 2), retry=1, parent_turn_id=None, num_tools=1)], set()),
        # Of two that run at once, each has its own retries.
        (
            [A, again("b", A, (0, 1)), again("c", A, (2, 3), retry=1)],
            {"b"},
        ),
        (
            [CUT, again("b", A, (0, 1)), again("c", A, (2, 3), retry=1)],
            {"a"},
        ),
    ],
)
def test_which_answers_were_lost(turns: list[TurnRecord], lost: set[str]) -> None:
    assert lost_answers(trajectory(turns)) == lost


def test_choices_of_one_call_are_no_retries() -> None:
    choices = [A, again("a-1", A, (0, 1), answer_id="a")]
    whole = trajectory(choices)
    assert lost_answers(whole) == frozenset()
    assert causes(whole) == {"a": Fork.ROOT, "a-1": Fork.CHOICE}
    # They are lost together, and not at all where the agent went on from one of them.
    retried = [again(f"b{i}", A, (1, 2), answer_id="b0", retry=1) for i in range(2)]
    assert lost_answers(trajectory([*choices, *retried])) == {"a", "a-1"}
    went_on = trajectory([*choices, *retried, call("c", retried[1], (2, 3))])
    assert lost_answers(went_on) == {"a", "a-1"}


def test_each_branch_has_a_cause() -> None:
    main = call("m1", at=(0, 1), num_tools=2)
    title = call("t", at=(0, 1), context=2, model="small", fork=Fork.SUB_AGENT)
    second = call("m2", main, (2, 3), num_tools=2)
    beside = call("m3", main, (2, 3), context=3, num_tools=2)
    third = call("m4", main, (9, 9), context=4, num_tools=2)
    sub = call("s", at=(4, 5), context=5, fork=Fork.SUB_AGENT)
    other = call("o1", at=(4, 5), context=6, model="small", num_tools=1, fork=Fork.SUB_AGENT)
    other2 = call("o2", other, (5, 6), model="small", num_tools=1)
    short = call(
        "k", at=(6, 7), context=8, num_tools=2, fork=Fork.COMPACTED, continues_turn_id="m2"
    )
    turns = [main, title, second, beside, third, sub, other, other2, short]
    whole = trajectory(turns)
    assert causes(whole) == {
        "m1": Fork.ROOT,
        "t": Fork.SIDE_REQUEST,
        "m2": Fork.NONE,
        "m3": Fork.PARALLEL,
        "m4": Fork.BRANCH,
        "s": Fork.SUB_AGENT,
        "o1": Fork.SUB_AGENT,  # an agent of its own: it has tools, and goes on
        "o2": Fork.NONE,
        "k": Fork.COMPACTED,
    }
    assert main_branch(whole) == {"m1", "m2", "k"}
    assert causes(trajectory(turns[:1])) == {"m1": Fork.ROOT}


def test_the_real_one_of_a_repeated_call_has_the_cause_of_the_call() -> None:
    first = call("x", at=(2, 3), context=2, fork=Fork.TOOLS_CHANGED)
    turns = [A, first, again("y", first, (3, 4), retry=1), again("z", first, (5, 6))]
    assert causes(trajectory(turns)) == {
        "a": Fork.ROOT,
        "x": Fork.LOST_ANSWER,
        "y": Fork.TOOLS_CHANGED,
        "z": Fork.RESAMPLE,
    }


def test_a_new_conversation_beside_a_running_one_is_a_parallel_call() -> None:
    new = call("b", at=(0.5, 2), context=2, fork=Fork.NEW_CONVERSATION)
    assert causes(trajectory([A, new]))["b"] is Fork.PARALLEL
    later = dataclasses.replace(new, started_at=1.0)
    assert causes(trajectory([A, later]))["b"] is Fork.NEW_CONVERSATION


@pytest.mark.parametrize(
    ("one", "other", "main"),
    [
        ({"num_tools": 1}, {"num": 9}, "a"),  # tools before length
        ({"num": 3}, {"num": 2}, "a"),
        ({}, {}, "b"),  # ends last
    ],
)
def test_of_conversations_with_as_many_turns(
    one: dict[str, Any], other: dict[str, Any], main: str
) -> None:
    whole = trajectory([call("a", **one), call("b", context=2, **other)])
    assert main_branch(whole) == {main}
    rewarded = trajectory(list(whole.turns.values()), turn_rewards={"a": 0.0})
    assert main_branch(rewarded) == {"a"}
    assert main_branch(trajectory([])) == frozenset()


def tree() -> list[TurnRecord]:
    """m1 ─┬─ m2 ── m3        and m1, lost once, and a sub-agent s"""
    lost = call("lost", at=(0, 1), num=5)
    m1 = again("m1", lost, (1, 2), retry=1)
    m2 = call("m2", m1, (2, 3), num=2)
    m3 = call("m3", m2, (5, 6), num=3)
    side = call("b", m1, (3, 4), context=3, num=4)
    sub = call("s", at=(4, 5), context=5, num=7, fork=Fork.SUB_AGENT)
    return [lost, m1, m2, side, sub, m3]


@pytest.mark.parametrize(
    ("credit", "turn_rewards", "returns", "masked"),
    [
        (
            "all",  # m1, m2, b, s, m3: in order of creation
            {},
            [0.0625, 0.125, 0.25, 0.5, 1.0],
            {Masked.LOST_ANSWER: 5},
        ),
        (
            "main",  # m1, m2, m3
            {},
            [0.25, 0.5, 1.0],
            {Masked.LOST_ANSWER: 5, Masked.SIDE_BRANCH: 11},
        ),
        (
            "per_branch",  # m1 has the mean of what follows: 0.5 * (0.5 + 1) / 2
            {},
            [0.375, 0.5, 1.0, 1.0, 1.0],
            {Masked.LOST_ANSWER: 5},
        ),
        (
            "per_branch",  # m3 was rewarded; on b and s nothing was: they have the sum, 2 + 4
            {"m3": 4.0, "m2": 2.0},
            [0.5 * (4 + 6) / 2, 4.0, 6.0, 6.0, 4.0],
            {Masked.LOST_ANSWER: 5},
        ),
        (
            "per_branch",  # m1 was: then none of its branches is without
            {"m1": 1.0},
            [1.0, 0.0, 0.0, 1.0, 0.0],
            {Masked.LOST_ANSWER: 5},
        ),
        (
            "main",  # the reward of what is left out reaches no other turn
            {"m3": 4.0, "b": 2.0},
            [1.0, 2.0, 4.0],
            {Masked.LOST_ANSWER: 5, Masked.SIDE_BRANCH: 11},
        ),
    ],
)
@pytest.mark.parametrize("style", STYLES)
def test_credit(
    style: ExportStyle,
    credit: Credit,
    turn_rewards: dict[str, float],
    returns: list[float],
    masked: dict[Masked, int],
) -> None:
    whole = trajectory(tree(), reward=None if turn_rewards else 1.0, turn_rewards=turn_rewards)
    out = rollout_samples(whole, export_style=style, turn_discount=0.5, credit=credit)
    assert (out.turn_returns.tolist(), out.masked) == (returns, masked)
    trained = [value for s in out.samples for value in s.returns[s.loss_mask].tolist()]
    ids = ["m1", "m2", "m3"] if credit == "main" else ["m1", "m2", "b", "s", "m3"]
    expected = [
        value
        for turn_id, value in zip(ids, returns, strict=True)
        for _ in whole.turns[turn_id].token_ids
    ]
    assert sorted(trained) == sorted(expected)


@st.composite
def any_rollout(draw: st.DrawFn) -> list[TurnRecord]:
    """Any tree of turns, with repeated calls, choices, cut answers, side requests and rewrites."""
    turns: list[TurnRecord] = []
    for index in range(draw(st.integers(1, 9))):
        turn_id = f"t{index}"
        started_at = draw(st.integers(0, 9))
        changes: dict[str, Any] = {
            "finish_reason": draw(st.sampled_from(["stop", "aborted"])),
            "retry": draw(st.integers(0, 2)),
        }
        at = (started_at, started_at + draw(st.integers(0, 3)))
        earlier = draw(st.sampled_from([None, *turns]))
        if earlier is not None and draw(st.booleans()):
            if draw(st.booleans()):
                changes["answer_id"] = earlier.answer_id
            turns.append(again(turn_id, earlier, at, **changes))
            continue
        changes["fork"] = draw(st.sampled_from([Fork.NONE, Fork.SUB_AGENT, Fork.NEW_CONVERSATION]))
        changes["model"] = draw(st.sampled_from(["m", "n"]))
        changes["num_tools"] = draw(st.integers(0, 1))
        if turns and draw(st.booleans()):
            changes["continues_turn_id"] = draw(st.sampled_from(turns)).turn_id
        context, num = draw(st.integers(1, 2)), draw(st.integers(0, 4))
        turns.append(call(turn_id, earlier, at, context, num, **changes))
    return turns


@settings(max_examples=200, deadline=None)
@given(
    any_rollout(),
    st.sampled_from(CREDITS),
    st.sampled_from(STYLES),
    st.one_of(st.none(), st.floats(-1, 1)),
    st.floats(0, 1),
    st.data(),
)
def test_every_sampled_token_is_trained_once_or_masked_once(
    turns: list[TurnRecord],
    credit: Credit,
    style: ExportStyle,
    reward: float | None,
    discount: float,
    data: st.DataObject,
) -> None:
    ids = [turn.turn_id for turn in turns]
    rewards = (
        {}
        if reward is not None
        else data.draw(st.dictionaries(st.sampled_from(ids), st.floats(-1, 1), max_size=3))
    )
    whole = trajectory(turns, reward=reward, turn_rewards=rewards)
    out = rollout_samples(whole, export_style=style, turn_discount=discount, credit=credit)
    num_sampled = sum(len(turn.token_ids) for turn in turns)
    num_trained = sum(sample.num_trained_tokens for sample in out.samples)
    assert num_trained + sum(out.masked.values()) == num_sampled
    lost, main = lost_answers(whole), main_branch(whole)
    followed = {before(turn) for turn in turns} | {turn.parent_turn_id for turn in turns}
    assert not lost & (followed | rewards.keys())
    assert main and not lost & main
    expected = [i for i in ids if i not in lost and (credit != "main" or i in main)]
    assert len(out.turn_returns) == len(expected)
    assert num_trained == sum(len(whole.turns[i].token_ids) for i in expected)
    why = causes(whole)
    assert list(why) == ids
    assert {i for i, cause in why.items() if cause is Fork.LOST_ANSWER} == lost
    if len(ids) == 1:
        assert not lost
