"""Turns and whole rollouts, for the tests of trees and samples."""

from __future__ import annotations

from areal_sub.records import (
    EndRecord,
    Fork,
    OpenRecord,
    Outcome,
    TurnRecord,
    float32,
    int32,
)
from areal_sub.trajectory.samples import ExportStyle
from areal_sub.trajectory.tree import Trajectory

STYLES: tuple[ExportStyle, ...] = ("concat", "individual")


def turn(
    turn_id: str, parent: TurnRecord | None, context: list[int], sampled: list[int]
) -> TurnRecord:
    before = 0 if parent is None else parent.num_prompt_tokens + len(parent.token_ids)
    return TurnRecord(
        rollout_id="r",
        turn_id=turn_id,
        parent_turn_id=None if parent is None else parent.turn_id,
        fork=Fork.ROOT if parent is None else Fork.NONE,
        context_token_ids=int32(context),
        token_ids=int32(sampled),
        rollout_logprobs=float32([-0.01 * t for t in sampled]),
        versions=int32([t % 3 for t in sampled]),
        finish_reason="stop",
        dialect="chat",
        model="m",
        temperature=1.0,
        top_p=1.0,
        started_at=0.0,
        ended_at=0.0,
        num_prompt_tokens=before + len(context),
    )


def trajectory(
    turns: list[TurnRecord],
    *,
    reward: float | None = None,
    turn_rewards: dict[str, float] | None = None,
    outcome: Outcome = Outcome.COMPLETED,
    error: str = "",
) -> Trajectory:
    opened = OpenRecord(
        rollout_id="r",
        group_id="g",
        task_id="t",
        split="train",
        policy_version=0,
        opened_at=0.0,
    )
    end = EndRecord.without_process(
        "r",
        outcome,
        reward=reward,
        turn_rewards=turn_rewards,
        num_turns=len(turns),
        error=error,
    )
    return Trajectory.build(opened, turns, end)
