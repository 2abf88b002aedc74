"""The certificate accepts what the engine vouches for, and masks what differs in a single token."""

from __future__ import annotations

import dataclasses

import numpy as np

from areal_sub.records import (
    EndRecord,
    Fork,
    Masked,
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
    end = EndRecord.without_process("r", Outcome.COMPLETED, reward=1.0, num_turns=len(turns))
    return Trajectory.build(OPEN, turns, end)


def two_turns() -> list[TurnRecord]:
    first = turn("a", None, [1, 2], [3, 4], [])
    return [first, turn("b", first, [5], [6, 7, 8], [1, 2, 3, 4])]


def test_what_the_engine_sampled_is_certified_whole() -> None:
    trajectory = build(two_turns())
    samples = rollout_samples(trajectory, export_style="concat", turn_discount=1.0, credit="all")
    certified, exactness = certify(trajectory, samples)
    assert certified is samples
    assert exactness == Exactness(num_verbatim=5, forks={Fork.ROOT: 1, Fork.NONE: 1})
    assert (exactness.share, exactness.num_sampled, exactness.num_masked) == (1.0, 5, 0)


def test_one_changed_context_token_masks_the_turn_that_follows_it_only() -> None:
    turns = two_turns()
    turns[1] = dataclasses.replace(turns[1], context_token_ids=int32([9]))
    trajectory = build(turns)
    samples = rollout_samples(trajectory, export_style="concat", turn_discount=1.0, credit="all")
    certified, exactness = certify(trajectory, samples)
    assert (exactness.num_verbatim, exactness.masked) == (2, {Masked.NOT_VERBATIM: 3})
    assert (exactness.share, exactness.num_sampled) == (0.4, 5)
    assert certified.masked == {Masked.NOT_VERBATIM: 3}
    np.testing.assert_array_equal(
        certified.samples[0].loss_mask, [False, False, True, True, False, False, False, False]
    )


def test_the_certificate_says_what_was_not_due_and_all_of_it_adds_up() -> None:
    first, second = two_turns()
    lost = dataclasses.replace(
        turn("c", first, [5], [9, 9], [1, 2, 3, 4]),
        fork=Fork.RESAMPLE,
        finish_reason="aborted",
    )
    title = dataclasses.replace(turn("d", None, [8], [8], []), fork=Fork.SUB_AGENT, model="small")
    trajectory = build([first, second, lost, title])
    samples = rollout_samples(trajectory, export_style="concat", turn_discount=1.0, credit="main")
    _, exactness = certify(trajectory, samples)
    total = exactness + exactness
    assert total == Exactness(
        num_verbatim=10,
        masked={Masked.LOST_ANSWER: 4, Masked.SIDE_BRANCH: 2},
        forks={Fork.ROOT: 2, Fork.NONE: 2, Fork.LOST_ANSWER: 2, Fork.SIDE_REQUEST: 2},
    )
    assert total.num_sampled == 2 * sum(len(turn.token_ids) for turn in trajectory.turns.values())
    metrics = total.metrics()
    columns = [n for n in metrics if n.startswith("exactness/num_masked_")]
    assert len(columns) == len(Masked)
    assert metrics["exactness/num_sampled_tokens"] == sum(
        metrics[name] for name in [*columns, "exactness/num_verbatim_tokens"]
    )
