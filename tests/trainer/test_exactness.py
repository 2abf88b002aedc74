"""The certificate accepts what the engine vouches for, and masks what differs in a single token."""

from __future__ import annotations

import dataclasses

import numpy as np

from areal_sub.records import (
    EndRecord,
    Fork,
    OpenRecord,
    Outcome,
    TurnRecord,
    extend_digest,
    float32,
    int32,
)
from areal_sub.trainer.exactness import Exactness, certify
from areal_sub.trajectory.samples import rollout_samples
from areal_sub.trajectory.tree import Trajectory

OPEN = OpenRecord(
    rollout_id="r", group_id="g", task_id="t", split="train", policy_version=0, opened_at=0.0
)


def turn(
    turn_id: str,
    parent: TurnRecord | None,
    context: list[int],
    sampled: list[int],
    before: list[int],
) -> TurnRecord:
    """`before`: the parent's full sequence; the digest is what an engine would send."""
    return TurnRecord(
        rollout_id="r",
        turn_id=turn_id,
        parent_turn_id=parent.turn_id if parent else None,
        fork=Fork.NONE if parent else Fork.ROOT,
        context_token_ids=int32(context),
        token_ids=int32(sampled),
        rollout_logprobs=float32([-0.5] * len(sampled)),
        versions=int32([0] * len(sampled)),
        finish_reason="stop",
        dialect="chat",
        model="m",
        temperature=1.0,
        top_p=1.0,
        started_at=0.0,
        ended_at=0.0,
        num_prompt_tokens=len(before) + len(context),
        engine_digest=extend_digest(0, int32(before + context + sampled)),
    )


def build(turns: list[TurnRecord]) -> Trajectory:
    end = EndRecord(
        rollout_id="r", outcome=Outcome.COMPLETED, reward=1.0, turn_rewards={}, error="",
        traceback="", stdout_tail="", stderr_tail="", wall_s=0.0, cpu_s=0.0, max_rss_bytes=0,
        num_turns=len(turns), num_rejected_calls=0, ended_at=0.0,
    )  # fmt: skip
    return Trajectory.build(OPEN, turns, end)


def two_turns() -> list[TurnRecord]:
    first = turn("a", None, [1, 2], [3, 4], [])
    return [first, turn("b", first, [5], [6, 7, 8], [1, 2, 3, 4])]


def test_what_the_engine_sampled_is_certified_whole() -> None:
    trajectory = build(two_turns())
    samples = rollout_samples(trajectory, export_style="concat", turn_discount=1.0)
    certified, exactness = certify(trajectory, samples)
    assert certified is samples
    assert exactness == Exactness(num_verbatim=5, num_masked=0) and exactness.share == 1.0


def test_one_changed_context_token_masks_the_turn_that_follows_it_only() -> None:
    turns = two_turns()
    turns[1] = dataclasses.replace(turns[1], context_token_ids=int32([9]))
    trajectory = build(turns)
    samples = rollout_samples(trajectory, export_style="concat", turn_discount=1.0)
    certified, exactness = certify(trajectory, samples)
    assert exactness == Exactness(num_verbatim=2, num_masked=3) and exactness.share == 0.4
    np.testing.assert_array_equal(
        certified.samples[0].loss_mask, [False, False, True, True, False, False, False, False]
    )
