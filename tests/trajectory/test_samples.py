"""Trajectory → training samples: what is trained, where, with which return."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollouts import STYLES, trajectory, turn

from areal_sub.errors import RecordError
from areal_sub.records import Outcome, TurnRecord, float32
from areal_sub.trajectory.samples import ExportStyle, rollout_samples, turn_returns


def forked() -> list[TurnRecord]:
    """a ─┬─ b      two branches that share a, and a root of their own in d"""
    a = turn("a", None, [1, 2], [10, 11])
    b = turn("b", a, [3], [12])
    c = turn("c", a, [4], [13, 14])
    d = turn("d", None, [5], [15])
    return [a, b, c, d]


def test_concat_trains_a_shared_turn_in_its_first_branch_only() -> None:
    out = rollout_samples(
        trajectory(forked(), reward=1.0), export_style="concat", turn_discount=0.5, credit="all"
    )
    assert [s.token_ids.tolist() for s in out.samples] == [
        [1, 2, 10, 11, 3, 12],
        [1, 2, 10, 11, 4, 13, 14],
        [5, 15],
    ]
    assert [s.loss_mask.astype(int).tolist() for s in out.samples] == [
        [0, 0, 1, 1, 0, 1],
        [0, 0, 0, 0, 0, 1, 1],
        [0, 1],
    ]
    first, second, third = out.samples
    np.testing.assert_array_equal(first.returns, float32([0, 0, 0.125, 0.125, 0, 0.25]))
    np.testing.assert_array_equal(second.returns, float32([0, 0, 0, 0, 0, 0.5, 0.5]))
    np.testing.assert_array_equal(third.returns, float32([0, 1.0]))
    np.testing.assert_array_equal(first.rollout_logprobs, float32([0, 0, -0.1, -0.11, 0, -0.12]))
    assert first.versions.tolist() == [-1, -1, 1, 2, -1, 0]
    assert (first.rollout_id, first.group_id) == (out.rollout_id, out.group_id) == ("r", "g")
    assert out.reward == 1.0
    assert out.mean_return == pytest.approx((0.125 + 0.25 + 0.5 + 1.0) / 4)


def test_individual_gives_each_turn_its_whole_prompt() -> None:
    out = rollout_samples(
        trajectory(forked(), reward=1.0), export_style="individual", turn_discount=1.0, credit="all"
    )
    assert [s.token_ids.tolist() for s in out.samples] == [
        [1, 2, 10, 11],
        [1, 2, 10, 11, 3, 12],
        [1, 2, 10, 11, 4, 13, 14],
        [5, 15],
    ]
    assert [s.token_ids[s.loss_mask].tolist() for s in out.samples] == [
        [10, 11],
        [12],
        [13, 14],
        [15],
    ]


def test_returns_are_discounted_backward_in_order_of_creation() -> None:
    ids = ["a", "b", "c"]
    final = turn_returns(ids, reward=2.0, turn_rewards={}, turn_discount=0.5)
    assert final.tolist() == [0.5, 1.0, 2.0]
    # The reward of a turn that is not there cannot reach any other.
    keyed = turn_returns(
        ids, reward=None, turn_rewards={"a": 1.0, "c": 4.0, "x": 9.0}, turn_discount=0.5
    )
    assert keyed.tolist() == [2.0, 2.0, 4.0]
    assert turn_returns(ids, reward=1.0, turn_rewards={}, turn_discount=0.0).tolist() == [0, 0, 1]
    assert turn_returns([], reward=1.0, turn_rewards={}, turn_discount=1.0).tolist() == []


def test_a_rollout_that_failed_counts_as_reward_zero() -> None:
    out = rollout_samples(
        trajectory(forked(), outcome=Outcome.TIMEOUT),
        export_style="concat",
        turn_discount=1.0,
        credit="all",
    )
    assert (out.reward, out.mean_return) == (0.0, 0.0)
    assert len(out.samples) == 3


def test_turn_rewards_sum_to_the_rollouts_reward() -> None:
    out = rollout_samples(
        trajectory(forked(), turn_rewards={"b": 0.25, "d": 0.5}),
        export_style="concat",
        turn_discount=0.0,
        credit="all",
    )
    assert out.reward == 0.75
    assert out.turn_returns.tolist() == [0.0, 0.25, 0.0, 0.5]


@pytest.mark.parametrize("style", STYLES)
def test_turns_that_sampled_nothing_give_no_sample(style: ExportStyle) -> None:
    a = turn("a", None, [1], [2])
    gone = turn("b", None, [3], [])
    out = rollout_samples(
        trajectory([a, gone]), export_style=style, turn_discount=1.0, credit="all"
    )
    assert [s.token_ids.tolist() for s in out.samples] == [[1, 2]]
    assert len(out.turn_returns) == 2
    empty = rollout_samples(
        trajectory([], reward=0.5), export_style=style, turn_discount=1.0, credit="all"
    )
    assert (empty.samples, empty.mean_return) == ((), 0.5)


@pytest.mark.parametrize("style", STYLES)
def test_tokens_sampled_from_an_empty_prompt_are_refused(style: ExportStyle) -> None:
    with pytest.raises(RecordError, match="turn a: tokens sampled from an empty prompt"):
        rollout_samples(
            trajectory([turn("a", None, [], [2])]),
            export_style=style,
            turn_discount=1.0,
            credit="all",
        )


@st.composite
def trees(draw: st.DrawFn) -> list[TurnRecord]:
    """Any tree of turns; every sampled token has an id of its own (from 1000)."""
    turns: list[TurnRecord] = []
    next_token = 1000
    for index in range(draw(st.integers(1, 8))):
        parent = draw(st.sampled_from([None, *turns]))
        num_sampled = draw(st.integers(0, 4))
        context = draw(st.lists(st.integers(0, 99), min_size=1, max_size=3))
        sampled = list(range(next_token, next_token + num_sampled))
        next_token += num_sampled
        turns.append(turn(f"t{index}", parent, context, sampled))
    return turns


@settings(max_examples=150, deadline=None)
@given(trees(), st.sampled_from(STYLES), st.floats(0, 1))
def test_each_sampled_token_is_trained_exactly_once(
    turns: list[TurnRecord], style: ExportStyle, discount: float
) -> None:
    whole = trajectory(turns, reward=1.0)
    out = rollout_samples(whole, export_style=style, turn_discount=discount, credit="all")
    trained = [int(t) for s in out.samples for t in s.token_ids[s.loss_mask]]
    assert sorted(trained) == [int(t) for turn in turns for t in turn.token_ids]

    source = {
        int(token): (logprob, version, value)
        for turn, value in zip(turns, out.turn_returns, strict=True)
        for token, logprob, version in zip(
            turn.token_ids, turn.rollout_logprobs, turn.versions, strict=True
        )
    }
    sequences = {tuple(whole.sequence(turn.turn_id).tolist()) for turn in turns}
    for sample in out.samples:
        assert tuple(sample.token_ids.tolist()) in sequences
        length = len(sample.token_ids)
        for array, dtype in (
            (sample.loss_mask, np.bool_),
            (sample.rollout_logprobs, np.float32),
            (sample.versions, np.int32),
            (sample.returns, np.float32),
        ):
            assert array.shape == (length,) and array.dtype == dtype
        for i in range(length):
            got = (sample.rollout_logprobs[i], sample.versions[i], sample.returns[i])
            expected = source[int(sample.token_ids[i])] if sample.loss_mask[i] else (0, -1, 0)
            assert got == expected
