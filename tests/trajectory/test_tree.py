"""A trajectory: the tree of a rollout's turns, and what is refused as one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from areal_sub.errors import RecordError
from areal_sub.records import EndRecord, Fork, OpenRecord, Outcome, TurnRecord, float32, int32
from areal_sub.trajectory.tree import Trajectory

OPEN = OpenRecord(
    rollout_id="r", group_id="g", task_id="t", split="train", policy_version=0, opened_at=0.0
)


def turn(turn_id: str, parent: TurnRecord | None, context: list[int], sampled: list[int]) -> Any:
    before = parent.num_prompt_tokens + len(parent.token_ids) if parent else 0
    return TurnRecord(
        rollout_id="r",
        turn_id=turn_id,
        parent_turn_id=parent.turn_id if parent else None,
        fork=Fork.NONE,
        context_token_ids=int32(context),
        token_ids=int32(sampled),
        rollout_logprobs=float32([0.0] * len(sampled)),
        versions=int32([0] * len(sampled)),
        finish_reason="stop",
        dialect="chat",
        model="m",
        temperature=1.0,
        top_p=1.0,
        started_at=0.0,
        ended_at=0.0,
        num_prompt_tokens=before + len(context),
    )


def end(num_turns: int, rollout_id: str = "r") -> EndRecord:
    return EndRecord.without_process(rollout_id, Outcome.COMPLETED, reward=1.0, num_turns=num_turns)


A = turn("a", None, [1, 2], [3])
B = turn("b", A, [4], [5, 6])
C = turn("c", A, [], [7])
D = turn("d", B, [8], [9])
E = turn("e", None, [10], [11])


def test_branches_and_sequences() -> None:
    tree = Trajectory.build(OPEN, [A, B, C, E, D], end(5))
    assert list(tree.turns) == ["a", "b", "c", "e", "d"]
    assert tree.children == {None: ["a", "e"], "a": ["b", "c"], "b": ["d"]}
    branches = [[turn.turn_id for turn in branch] for branch in tree.branches()]
    assert branches == [["a", "c"], ["e"], ["a", "b", "d"]]
    assert tree.sequence("d").tolist() == [1, 2, 3, 4, 5, 6, 8, 9]
    assert tree.sequence("c").tolist() == [1, 2, 3, 7]
    assert tree.sequence("e").dtype.name == "int32"


def test_no_turns() -> None:
    assert Trajectory.build(OPEN, [], end(0)).branches() == []


@pytest.mark.parametrize(
    ("turns", "last", "message"),
    [
        ([B], end(1), "parent a was not recorded before"),
        ([A, A], end(2), "recorded twice"),
        ([dataclasses.replace(A, rollout_id="s")], end(1), "among the records of rollout r"),
        ([dataclasses.replace(A, num_prompt_tokens=3)], end(1), "says 3 prompt tokens"),
        ([dataclasses.replace(A, versions=int32([]))], end(1), "differ in length"),
        ([A], end(2), "end record says 2"),
        ([A], end(1, "s"), "of rollout s"),
    ],
)
def test_what_does_not_fit_is_refused(
    turns: list[TurnRecord], last: EndRecord, message: str
) -> None:
    with pytest.raises(RecordError, match=message):
        Trajectory.build(OPEN, turns, last)
