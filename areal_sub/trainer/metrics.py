"""One line per step in `metrics.jsonl`, the same scalars for TensorBoard, and the reward curve."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from areal_sub.config.schema import StatsLoggerConfig
from areal_sub.errors import WriteError
from areal_sub.learner.durable import whole_file
from areal_sub.trainer.run_dir import RunDir

log = logging.getLogger(__name__)


class MetricsLog:
    """Appends; a resumed run first drops the lines of steps that it will take again."""

    def __init__(self, run: RunDir, config: StatsLoggerConfig, *, first_step: int) -> None:
        self._plot = run.plot if config.plot else None
        self.rows = [row for row in read_metrics(run.metrics) if row["step"] < first_step]
        with whole_file(run.metrics) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        self._file = run.metrics.open("a")
        self._tensorboard: Any = None
        if config.tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(run.tensorboard), purge_step=first_step)

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """`values` by slash-separated name. A NaN is kept as null: JSON has none."""
        clean = {k: v if math.isfinite(v) else None for k, v in values.items()}
        row = {"step": step, **clean}
        self.rows.append(row)
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise WriteError(f"cannot write {self._file.name}: {error}") from error
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()

    def close(self) -> None:
        """Never raises: how the run ended is not for a file of these to say."""
        with contextlib.suppress(OSError):  # `write` has told it
            self._file.close()
        try:
            if self._tensorboard is not None:
                self._tensorboard.close()
        except Exception as error:
            log.warning("TensorBoard's files are not whole: %s", error)
        try:
            if self._plot is not None and self.rows:
                plot_reward(self.rows, self._plot)
        except Exception as error:  # also of matplotlib, which is not there or misconfigured
            log.warning("there is no reward curve: %s", error)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a line torn by a crash ends it."""
    rows: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def plot_reward(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Training and validation reward over steps, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, label, marker in (
        ("reward/train", "training (sampled)", None),
        ("reward/valid", "validation (held out)", "o"),
    ):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            steps, rewards = zip(*points, strict=True)
            axes.plot(steps, rewards, label=label, marker=marker)
    axes.set_xlabel("step")
    axes.set_ylabel("mean reward")
    axes.grid(alpha=0.3)
    axes.legend()
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120)
