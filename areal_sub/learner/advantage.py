"""Group-relative advantages: a rollout is judged against its siblings on the same task. Pure.

    mean_std         GRPO (arXiv:2402.03300): the group's mean is the baseline, its standard
                     deviation the unit
    mean             Dr. GRPO (arXiv:2503.20783) leaves the division out, as it weighs tasks by how
                     easy they are
    leave_one_out    RLOO (arXiv:2402.14740): the baseline is the mean of the others, which makes it
                     independent of the rollout itself; that is n / (n - 1) times `mean`
    mean_batch_std   REINFORCE++-baseline (arXiv:2501.03262): the unit is the standard deviation of
                     what is left in the whole batch, so that tasks keep their weights

One vote per rollout: mean and standard deviation are over the rollouts' mean turn returns, so that
a rollout of many turns does not pull the baseline towards itself. A token's advantage is then that
of its turn's return.

Invariant: a group whose rollouts all did equally well teaches nothing under a group baseline, and
gets advantage 0. Without the rule `mean_std` would divide rounding errors by `EPS`, or blow up what
the turns of one rollout differ by; with `mean`, a turn discount alone would punish early turns.
Degenerate groups are counted, as they are wasted sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from areal_sub.records import Float32Array

AdvantageNorm = Literal["none", "mean", "mean_std", "leave_one_out", "mean_batch_std"]

EPS = 1e-6
# Spread of equal rewards after float32 rounding, relative to their size.
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class Baseline:
    """`advantage = (return - mean) * scale`."""

    mean: float
    scale: float
    degenerate: bool  # all rollouts did equally well

    def advantages(self, returns: Float32Array) -> Float32Array:
        """Advantages of tokens with these returns, same shape."""
        return ((returns.astype(np.float64) - self.mean) * self.scale).astype(np.float32)


def group_baselines(batch: Sequence[Sequence[float]], norm: AdvantageNorm) -> list[Baseline]:
    """Baseline of each group of a batch.

    `batch`: each rollout's mean return, by group; a group has at least one. Standard deviations are
    the population's (a group is all there is, not a draw from more siblings). With `none` the
    return is the advantage, and degenerate groups are only counted.
    """
    groups = [np.asarray(votes, dtype=np.float64) for votes in batch]
    if any(votes.size == 0 for votes in groups):
        raise ValueError("a group needs at least one rollout")
    left = [votes - votes.mean() for votes in groups]
    batch_std = float(np.concatenate(left).std()) if left else 0.0
    return [_baseline(votes, norm, batch_std) for votes in groups]


def _baseline(votes: NDArray[np.float64], norm: AdvantageNorm, batch_std: float) -> Baseline:
    mean, std = float(votes.mean()), float(votes.std())
    degenerate = std <= _ROUNDING * max(1.0, abs(mean))
    if norm == "none":
        return Baseline(0.0, 1.0, degenerate)
    if degenerate:  # a group of one is, too
        return Baseline(mean, 0.0, True)
    match norm:
        case "mean":
            scale = 1.0
        case "mean_std":
            scale = 1.0 / (std + EPS)
        case "leave_one_out":
            scale = votes.size / (votes.size - 1)
        case "mean_batch_std":
            scale = 1.0 / (batch_std + EPS)
    return Baseline(mean, scale, False)
