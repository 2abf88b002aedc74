"""Learning rate schedules, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from areal_sub.config.schema import OptimizerConfig
from areal_sub.learner.schedule import learning_rate


def rates(total: int, steps: range, **options: Any) -> list[float]:
    optimizer = OptimizerConfig(lr=1.0, **options)
    return [learning_rate(step, total_steps=total, optimizer=optimizer) for step in steps]


def test_constant() -> None:
    assert rates(4, range(6)) == [1.0] * 6


def test_warm_up_rises_linearly_and_its_first_step_already_learns() -> None:
    assert rates(8, range(6), warmup_steps_proportion=0.5) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_reaches_its_end_with_the_last_step_and_stays() -> None:
    got = rates(5, range(7), lr_scheduler_type="linear", min_lr_ratio=0.2)
    assert got == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])


def test_cosine_after_warm_up() -> None:
    got = rates(7, range(8), lr_scheduler_type="cosine", warmup_steps_proportion=2 / 7)
    half = 0.5**0.5
    assert got == pytest.approx([0.5, 1.0, 1.0, (1 + half) / 2, 0.5, (1 - half) / 2, 0, 0])


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_one_step_runs_learn(kind: str, warmup: float) -> None:
    assert rates(1, range(1), lr_scheduler_type=kind, warmup_steps_proportion=warmup) == [1.0]
