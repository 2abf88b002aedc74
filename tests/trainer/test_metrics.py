"""What is kept of each step, and what becomes of a run whose curve cannot be."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest

from areal_sub.config import Config
from areal_sub.config.schema import StatsLoggerConfig
from areal_sub.trainer.metrics import MetricsLog, read_metrics
from areal_sub.trainer.run_dir import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    names = {"experiment_name": "e", "trial_name": "t", "cluster": {"fileroot": str(tmp_path)}}
    return RunDir.open(Config.model_validate({**names, "actor": {"path": "p"}}))


def test_rows_are_kept_and_those_that_come_again_are_dropped(run: RunDir) -> None:
    config = StatsLoggerConfig(tensorboard=False, plot=False)
    metrics = MetricsLog(run, config, first_step=1)
    metrics.write(1, {"reward/train": 0.5})
    metrics.write(2, {"reward/train": math.nan})
    metrics.close()
    assert read_metrics(run.metrics) == metrics.rows
    assert json.loads(run.metrics.read_text().splitlines()[1])["reward/train"] is None
    resumed = MetricsLog(run, config, first_step=2)
    resumed.close()
    run.close()
    assert [row["step"] for row in resumed.rows] == [1]


def test_a_curve_that_cannot_be_written_is_told_and_ends_nothing(
    run: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = MetricsLog(run, StatsLoggerConfig(tensorboard=False), first_step=1)
    metrics.write(1, {"reward/train": 0.5})
    run.plot.mkdir()
    with caplog.at_level(logging.WARNING):
        metrics.close()
    (told,) = caplog.messages
    assert told.startswith(f"there is no reward curve: cannot write {run.plot}"), told
    run.plot.rmdir()
    metrics.close()
    assert run.plot.read_bytes().startswith(b"\x89PNG")
    run.close()
