"""What becomes of a run's errors on their way to whoever called `Trainer.train`."""

from __future__ import annotations

import asyncio

import pytest

from areal_sub.config import Config
from areal_sub.errors import ConfigError
from areal_sub.trainer import Trainer

CONFIG = Config.model_validate({"experiment_name": "e", "trial_name": "t", "actor": {"path": "p"}})


def test_an_error_comes_alone() -> None:
    with pytest.raises(ConfigError, match="no tasks") as caught:
        Trainer(CONFIG).train()
    assert caught.value.__context__ is None


def test_it_comes_through_a_running_event_loop() -> None:
    async def notebook() -> None:
        Trainer(CONFIG).train()

    with pytest.raises(ConfigError, match="no tasks"):
        asyncio.run(notebook())
