"""Group-relative advantages: a rollout is judged against its siblings on the same task. Pure.

GRPO (arXiv:2402.03300) uses the group's mean as baseline and divides by its standard deviation;
Dr. GRPO (arXiv:2503.20783) leaves the division out, as it weighs tasks by how easy they are.

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

from areal_sub.records import Float32Array

AdvantageNorm = Literal["none", "mean", "mean_std"]

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


def group_baseline(mean_returns: Sequence[float], norm: AdvantageNorm) -> Baseline:
    """Baseline of one group.

    `mean_returns`: [num_rollouts], at least one. The standard deviation is the population's (a
    group is all there is, not a draw from more siblings). With `none` the return is the advantage,
    and degenerate groups are only counted.
    """
    votes = np.asarray(mean_returns, dtype=np.float64)
    if votes.size == 0:
        raise ValueError("a group needs at least one rollout")
    mean, std = float(votes.mean()), float(votes.std())
    degenerate = std <= _ROUNDING * max(1.0, abs(mean))
    if norm == "none":
        return Baseline(0.0, 1.0, degenerate)
    if degenerate:
        return Baseline(mean, 0.0, True)
    return Baseline(mean, 1.0 if norm == "mean" else 1.0 / (std + EPS), False)
