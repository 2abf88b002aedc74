"""What becomes of a run's errors on their way to whoever called `Trainer.train`."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from areal_sub.config import Config
from areal_sub.errors import ConfigError, RecordError
from areal_sub.trainer import Trainer
from areal_sub.trainer.trainer import _close_ledger

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


class FullLedger:
    def close(self, ended: str, error: str) -> None:
        raise RecordError("cannot append")


def test_a_ledger_that_cannot_be_closed_hides_nothing(caplog: pytest.LogCaptureFixture) -> None:
    ledger = cast("Any", FullLedger())
    _close_ledger(ledger, "failed", "why")
    assert caplog.messages == ["cannot append"]
    with pytest.raises(RecordError):
        _close_ledger(ledger, "done", "")
