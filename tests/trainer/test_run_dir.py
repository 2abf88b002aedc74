"""The run's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from areal_sub.config import Config
from areal_sub.errors import ConfigError
from areal_sub.trainer.run_dir import RunDir


def config(fileroot: Path) -> Config:
    return Config.model_validate(
        {
            "experiment_name": "e",
            "trial_name": "t",
            "cluster": {"fileroot": str(fileroot)},
            "actor": {"path": "p"},
            "recover": {"mode": "auto"},
        }
    )


def test_one_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"the run's folder cannot be made: .*file"):
        RunDir.open(config(tmp_path / "file"))


def test_what_stands_where_a_folder_should_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "e" / "t").mkdir(parents=True)
    (tmp_path / "e" / "t" / "logs").touch()
    with pytest.raises(ConfigError, match=r"the run's folder cannot be made: .*logs"):
        RunDir.open(config(tmp_path))


def test_one_trainer_at_a_time(tmp_path: Path) -> None:
    run = RunDir.open(config(tmp_path))
    with pytest.raises(ConfigError, match="in use by another trainer"):
        RunDir.open(config(tmp_path))
    run.close()
    again = RunDir.open(config(tmp_path))
    assert again.root == run.root
    again.close()
