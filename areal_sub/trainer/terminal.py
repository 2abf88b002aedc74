"""What a person sees: a header, live progress, a line per step where there is no terminal, and a
summary that says where everything lies and what failed."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any, cast

from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from areal_sub.config import Config
from areal_sub.records import Fork, Outcome
from areal_sub.trainer.agents import agent_text
from areal_sub.trainer.checkpoints import FINAL
from areal_sub.trainer.output import Output
from areal_sub.trainer.progress import Grading, Progress
from areal_sub.trainer.run_dir import RunDir
from areal_sub.trajectory.accounting import Accounting

_BARS = "▁▂▃▄▅▆▇█"
_MAX_SPARK = 60
_MAX_ERROR_CHARS = 160
_MAX_INCIDENTS = 10


def sparkline(values: Sequence[float], *, low: float = 0.0, high: float = 1.0) -> str:
    """The last values as block characters; the scale widens where values leave [low, high]."""
    values = list(values)[-_MAX_SPARK:]
    if not values:
        return ""
    low, high = min(low, *values), max(high, *values)
    scale = (len(_BARS) - 1) / ((high - low) or 1.0)
    return "".join(_BARS[round((value - low) * scale)] for value in values)


class Terminal:
    """One per run, which goes on where nothing can be shown (`output`)."""

    def __init__(self) -> None:
        self._output = Output(sys.stdout)
        self._console = Console(file=cast("IO[str]", self._output), highlight=False)
        self._started_at = time.monotonic()
        self._num_printed = 0

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def header(self, config: Config, run: RunDir, *, num_tasks: int, num_valid: int) -> None:
        self._output.elsewhere = str(run.metrics)
        openai = config.rollout.openai
        self._console.print(f"[bold]areal-sub[/] {config.experiment_name}/{config.trial_name}")
        self.say(f"  agent      {agent_text(config)}, {openai.mode}")
        if openai.agent_env is not None:
            self.say(f"  its env    {openai.agent_env}")
        lora = config.actor.lora
        trained = f", LoRA of rank {lora.rank}" if lora is not None else ""
        self.say(
            f"  policy     {config.actor.path}, {config.actor.dtype}{trained}, "
            f"{config.engine.type} engine"
        )
        said_by = "the agent, by what it returns"
        self.say(f"  reward     {said_by if openai.reward == 'agent' else openai.reward}")
        self.say(f"  tasks      {num_tasks} to train on, {num_valid} held out, seed {config.seed}")
        self.say(
            f"  step       {_batch_size(config)} tasks x {config.gconfig.n_samples} rollouts, "
            f"staleness up to {config.rollout.max_head_offpolicyness}"
        )
        self.say(f"  run        {run.root}")
        if run.moved_to is not None:
            self.say(f"  (an earlier run of this name was moved to {run.moved_to})")

    @contextmanager
    def live(self, progress: Progress) -> Iterator[None]:
        """Show `progress` while the block runs."""
        if not self._console.is_terminal:
            progress.listener = self._print_new_rows
            yield
            self._print_new_rows(progress)
            return
        with Live(
            get_renderable=lambda: self._panel(progress),
            console=self._console,
            refresh_per_second=4,
            transient=True,
        ):
            yield

    def _say_tampering(self, progress: Progress) -> None:
        if not progress.tampering:
            return
        self.say("  tampering          none of this had an effect; see docs/rewards.md")
        for sign, count in sorted(progress.tampering.items()):
            self.say(f"    {count} x {_TAMPERING_TEXT.get(sign, sign)} ({sign})")
            for example in progress.tampering_examples.get(sign, []):
                self.say(f"      {example}")

    def _print_new_rows(self, progress: Progress) -> None:
        while self._num_printed < len(progress.rows):
            row = progress.rows[self._num_printed]
            if row["step"] > progress.went_on_from or not progress.went_on_from:
                self.say(_row_text(row, progress.num_steps))
            self._num_printed += 1

    def _panel(self, progress: Progress) -> RenderableType:
        elapsed_s = time.monotonic() - self._started_at
        row = progress.rows[-1] if progress.rows else {}
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", justify="right")
        grid.add_column()
        grid.add_row("step", f"{progress.step}/{progress.num_steps}   {progress.doing}")
        grid.add_row(
            "", ProgressBar(total=progress.num_steps, completed=progress.step, width=_MAX_SPARK)
        )
        for name, label in (("reward/train", "reward"), ("reward/valid", "held out")):
            values = _values(progress, name)
            if values:
                grid.add_row(label, Text(f"{sparkline(values)}  {values[-1]:.3f}"))
        if row:
            grid.add_row(
                "speed",
                f"{row.get('rate/tokens_per_s', 0):.0f} sampled tokens/s   "
                f"{row.get('rate/rollouts_per_s', 0):.1f} rollouts/s   "
                f"{row.get('time/step_s', 0):.1f} s/step",
            )
            grid.add_row(
                "staleness",
                f"mean {row.get('staleness/mean', 0):.2f}   "
                f"max {row.get('staleness/max', 0):.0f}   "
                f"|Δ logprob| {row.get('learner/logprob_delta_mean', 0):.1e}   "
                f"entropy {row.get('learner/entropy', 0):.2f}",
            )
        failed = {o: n for o, n in progress.outcomes.items() if o is not Outcome.COMPLETED}
        failures = "   ".join(f"{outcome} {count}" for outcome, count in failed.items()) or "none"
        grid.add_row(
            "rollouts", f"{progress.num_rollouts} trained on or waiting   failures: {failures}"
        )
        if progress.grading is not None and progress.grading.num_failed:
            grid.add_row("grader", Text(_grading_text(progress.grading), style="bold red"))
        if progress.tampering:
            grid.add_row("tampering", Text(_counts(progress.tampering), style="bold red"))
        grid.add_row("elapsed", f"{elapsed_s:.0f} s")
        return Panel(grid, title="areal-sub", border_style="blue")

    def summary(self, run: RunDir, progress: Progress) -> None:
        """What came of it; also printed where the run ended early."""
        rows = [row for row in progress.rows if row.get("reward/train") is not None]
        valid = _values(progress, "reward/valid")
        elapsed_s = time.monotonic() - self._started_at
        self._console.rule()
        self.say(f"{progress.step} of {progress.num_steps} steps in {elapsed_s:.0f} s")
        if rows:
            self.say(f"  training reward    {_course(_values(progress, 'reward/train'))}")
            if valid:
                self.say(f"  validation reward  {_course(valid)}")
            for line in _by_agent(progress):
                self.say(line)
            delta = "learner/logprob_delta_mean"
            self.say(
                f"  mean |Δ| of sampler's and learner's logprobs: {rows[0][delta]:.1e} at step "
                f"{rows[0]['step']}, {rows[-1][delta]:.1e} at the end"
            )
        self.say(_exactness_text(progress))
        self.say(f"  rollouts           {_counts(progress.outcomes)}")
        for outcome, error in progress.examples.items():
            self.say(f"    {outcome}: {error[:_MAX_ERROR_CHARS]}")
        if progress.incidents:
            ended = Counter(incident.component for incident in progress.incidents)
            self.say(f"  processes ended    {_counts(ended)}; what was lost with them is above")
            for incident in progress.incidents[-_MAX_INCIDENTS:]:
                self.say(f"    {incident}"[:_MAX_ERROR_CHARS])
        if progress.grading is not None:
            self.say(f"  grader             {_grading_text(progress.grading)}")
        self._say_tampering(progress)
        if progress.accounting is not None:
            self._accounted(progress.accounting)
        for label, path in (
            ("checkpoint", run.checkpoints / FINAL),
            ("journal", run.journal),
            ("metrics", run.metrics),
            ("tensorboard", run.tensorboard),
            ("reward plot", run.plot),
            ("logs", run.logs),
            ("incidents", run.incidents),
        ):
            if path.exists():
                self.say(f"  {label:18} {path}")

    def _accounted(self, accounting: Accounting) -> None:
        self.say(f"  accounted for      {accounting}")
        for problem in accounting.problems:
            self._console.print(
                Text(f"  error: rollouts are not accounted for: {problem}", style="bold red"),
                soft_wrap=True,
            )


_TAMPERING_TEXT = {
    "claim_differs": "claimed another reward than the grader's",
    "foreign_key": "used the key of another running rollout",
    "finished_key": "used the key of another rollout, which had ended",
    "unknown_key": "used a key that no rollout ever had",
    "call_after_end": "called after its end",
    "control_route": "asked for what only the control plane does",
    "unknown_route": "asked for a route that is not there",
}


def _grading_text(grading: Grading) -> str:
    failed = f", {grading.num_failed} FAILED and do not count" if grading.num_failed else ""
    return f"{grading.name}: {grading.num_graded} graded, {grading.num_retried} retried{failed}"


def _values(progress: Progress, name: str) -> list[float]:
    return [row[name] for row in progress.rows if row.get(name) is not None]


def _by_agent(progress: Progress) -> list[str]:
    """How each agent fared, where the run has several."""
    prefix = "reward/train/"
    names = sorted({name for row in progress.rows for name in row if name.startswith(prefix)})
    lines = []
    for name in names:
        agent = name.removeprefix(prefix)
        num = sum(_values(progress, f"batch/num_rollouts/{agent}"))
        lines.append(f"    {agent:16} {_course(_values(progress, name))}   {num:.0f} rollouts")
    return lines


def _course(values: Sequence[float]) -> str:
    return f"{values[0]:.3f} → {values[-1]:.3f}   {sparkline(values)}"


def _exactness_text(progress: Progress) -> str:
    exact = progress.exactness
    forks = {f: n for f, n in exact.forks.items() if f not in (Fork.NONE, Fork.ROOT)}
    masked = f" ({_counts(exact.masked)})" if exact.num_masked else ""
    return (
        f"  exactness          {100 * exact.share:.2f} % of {exact.num_due} trained tokens "
        f"sampled verbatim, {exact.num_masked} masked{masked}, of {exact.num_sampled} sampled for "
        f"these steps; forks: {_counts(forks)}"
    )


def _counts(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"


def _row_text(row: dict[str, Any], num_steps: int) -> str:
    valid = row.get("reward/valid")
    if row.get("reward/train") is None:
        return f"step {row['step']:4d}/{num_steps}  held out {valid:.3f}"
    held_out = "" if valid is None else f"  held out {valid:.3f}"
    return (
        f"step {row['step']:4d}/{num_steps}  reward {row['reward/train']:.3f}"
        f"  {row['rate/tokens_per_s']:.0f} tok/s  {row['rate/rollouts_per_s']:.1f} rollouts/s"
        f"  staleness {row['staleness/max']:.0f}  |Δ| {row['learner/logprob_delta_mean']:.1e}"
        f"  {row['time/step_s']:.1f} s{held_out}"
    )


def _batch_size(config: Config) -> int:
    return config.train_dataset.batch_size if config.train_dataset else 0
