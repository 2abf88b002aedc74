from __future__ import annotations

from areal_sub.config.schema import FrequencyConfig
from areal_sub.trainer.schedule import Every


def due_steps(config: FrequencyConfig, epochs: list[int]) -> list[int]:
    every = Every(config)
    return [step for step, epoch in enumerate(epochs, start=1) if every(step, epoch)]


def test_nothing_configured_is_never_due() -> None:
    assert due_steps(FrequencyConfig(), [0] * 10) == []


def test_steps_and_epochs() -> None:
    assert due_steps(FrequencyConfig(freq_steps=3), [0] * 7) == [3, 6]
    assert due_steps(FrequencyConfig(freq_epochs=1), [0, 0, 1, 1, 2, 2, 3]) == [3, 5, 7]
    assert due_steps(FrequencyConfig(freq_steps=4, freq_epochs=2), [0, 0, 1, 1, 2, 2]) == [4, 5]
