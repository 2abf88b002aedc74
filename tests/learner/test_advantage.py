"""Group-relative advantages, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from areal_sub.learner.advantage import EPS, AdvantageNorm, Baseline, group_baselines
from areal_sub.records import float32


def group_baseline(votes: list[float], norm: AdvantageNorm) -> Baseline:
    return group_baselines([votes], norm)[0]


def test_mean_std_is_grpo() -> None:
    baseline = group_baseline([1.0, 0.0, 0.0, 0.0], "mean_std")
    std = math.sqrt(3) / 4
    np.testing.assert_allclose(
        baseline.advantages(float32([1, 0])), [0.75 / (std + EPS), -0.25 / (std + EPS)], rtol=1e-6
    )
    assert not baseline.degenerate


def test_mean_is_dr_grpo() -> None:
    assert group_baseline([1.0, 0.0, 0.0, 0.0], "mean") == Baseline(0.25, 1.0, False)


def test_none_leaves_the_return_alone() -> None:
    assert group_baseline([1.0, 0.0], "none") == Baseline(0.0, 1.0, False)
    assert group_baseline([1.0, 1.0], "none") == Baseline(0.0, 1.0, True)


def test_a_turns_own_return_is_what_counts() -> None:
    # Two rollouts: turns worth (0, 1) and (0,). Votes 0.5 and 0.
    advantages = group_baseline([0.5, 0.0], "mean").advantages(float32([0, 1, 0]))
    assert advantages.tolist() == [-0.25, 0.75, -0.25]
    assert advantages.dtype == np.float32


@pytest.mark.parametrize("norm", ["mean", "mean_std", "leave_one_out", "mean_batch_std"])
@pytest.mark.parametrize("votes", [[1.0] * 8, [0.7], [0.1, 0.1 + 3e-9, 0.1 - 3e-9], [-1e6] * 3])
def test_equal_rollouts_teach_nothing(norm: AdvantageNorm, votes: list[float]) -> None:
    baseline = group_baseline(votes, norm)
    assert baseline.degenerate
    # Not even turns that differ within a rollout, which 1 / (0 + EPS) would blow up.
    assert (baseline.advantages(float32([0.0, 1.0, votes[0]])) == 0).all()


def test_small_but_real_differences_count() -> None:
    baseline = group_baseline([0.100, 0.101], "mean_std")
    np.testing.assert_allclose(baseline.advantages(float32([0.100, 0.101])), [-1, 1], rtol=5e-3)


def test_an_empty_group_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one rollout"):
        group_baseline([], "mean")


def test_leave_one_out_is_rloo() -> None:
    # The good one against the mean of the others: 1 - 0; a bad one: 0 - 1/3.
    baseline = group_baseline([1.0, 0.0, 0.0, 0.0], "leave_one_out")
    np.testing.assert_allclose(baseline.advantages(float32([1, 0])), [1.0, -1 / 3], rtol=1e-6)


def test_mean_batch_std_is_reinforce_plus_plus_baseline() -> None:
    # What is left of the groups: ±0.5, ±0.1 and (degenerate) 0, 0; variance (0.5 + 0.02) / 6.
    baselines = group_baselines([[1.0, 0.0], [0.6, 0.4], [1.0, 1.0]], "mean_batch_std")
    unit = 1 / (math.sqrt(0.52 / 6) + EPS)
    assert [b.scale for b in baselines] == pytest.approx([unit, unit, 0.0])
    assert [b.mean for b in baselines] == [0.5, 0.5, 1.0]
