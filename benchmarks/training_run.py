"""A whole training run as a user starts it, for benchmarks that compare runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
DEFAULT = REPO / "examples" / "proxy" / "config.yaml"


def rows_of_run(
    config: Path, folder: Path, experiment: str, trial: str, settings: Sequence[str]
) -> list[dict[str, float]]:
    """The rows of its metrics, one per step. One that `folder` has already is not made again."""
    ended = folder / experiment / trial
    if not (ended / "checkpoints" / "final").exists():
        command = [
            *(sys.executable, "-m", "areal_sub", "train", "--config", str(config)),
            *(f"experiment_name={experiment}", f"trial_name={trial}", f"cluster.fileroot={folder}"),
            *("stats_logger.tensorboard=false", "stats_logger.plot=false"),
            *settings,
        ]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    rows = [json.loads(line) for line in (ended / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["step"]]
