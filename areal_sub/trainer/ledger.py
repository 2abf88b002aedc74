"""The ledger: what the trainer did with each rollout, appended to the run's folder as it decides.

One file per attempt, of the journal's format, beside the proxy's journal. Per rollout one record;
why a single token was trained or not follows from it and the rollout's turns
(`inspection/tokens.py`). A rollout that was started is decided on once, at the latest by `left`
when the run ends: that is the identity which `trajectory/accounting.py` checks. Only the trainer's
event loop calls this.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from areal_sub.config import Config
from areal_sub.learner.advantage import group_baselines
from areal_sub.records import BeganRecord, ClosedRecord, Fate, FateRecord, Masked, Outcome
from areal_sub.rollout.staleness import staleness
from areal_sub.trainer.exactness import Exactness
from areal_sub.trajectory.journal import Journal
from areal_sub.trajectory.samples import RolloutSamples
from areal_sub.trajectory.tree import Trajectory


class Ledger:
    """The open ledger of this attempt. Its methods raise `RecordError` where it cannot be written.

    `num_decided`: rollouts by fate, since they were last looked at by `take_counts`.
    """

    def __init__(
        self, path: Path, config: Config, *, policy_version: int, tokenizer_path: str
    ) -> None:
        self._journal = Journal(path)
        self._counts: Counter[Fate] = Counter()
        self._decided: list[str] = []
        openai = config.rollout.openai
        self._journal.append(
            BeganRecord(
                policy_version=policy_version,
                began_at=time.time(),
                export_style=openai.export_style,
                turn_discount=openai.turn_discount,
                trains_without_advantage=config.actor.kl_ctl > 0,
                tokenizer_path=str(Path(tokenizer_path).resolve()),
                credit=openai.credit,
            )
        )

    def decided(self, record: FateRecord) -> None:
        self._journal.append(record)
        self._counts[record.fate] += 1
        if not record.attempt:
            self._decided.append(record.rollout_id)

    def left_out(self, trajectory: Trajectory, fate: Fate, version: int) -> None:
        """The group's members are known to be of no use, or to be too old."""
        age = staleness(version, trajectory.oldest_version)
        record = _record(trajectory.open.rollout_id, fate, version=version, age=age)
        self.decided(dataclasses.replace(record, attempt=trajectory.attempt))

    def given_up(self, rollout_id: str, version: int) -> None:
        """Its end did not come in time; another one takes its place."""
        self.decided(_record(rollout_id, Fate.RETRIED, version=version))

    def take_decided(self) -> list[str]:
        """Rollouts of this attempt that were decided on since this was last called."""
        decided, self._decided = self._decided, []
        return decided

    def evaluated(self, rollout_ids: Iterable[str], version: int) -> None:
        for rollout_id in rollout_ids:
            self.decided(_record(rollout_id, Fate.EVALUATED, version=version))

    def left(self, rollouts: Iterable[tuple[str, int]], version: int) -> None:
        """The run ends, and these (id, attempt) are not decided on. Some may never have been
        opened."""
        for rollout_id, attempt in rollouts:
            record = _record(rollout_id, Fate.UNUSED, version=version)
            self.decided(dataclasses.replace(record, attempt=attempt))

    def take_counts(self) -> Counter[Fate]:
        counts, self._counts = self._counts, Counter()
        return counts

    def close(self, ended: str, error: str) -> None:
        try:
            self._journal.append(ClosedRecord(ended=ended, error=error, closed_at=time.time()))
        finally:
            self._journal.close()


def learned(
    groups: Sequence[Sequence[tuple[Trajectory, RolloutSamples, Exactness]]],
    config: Config,
    *,
    step: int,
    all_skipped: bool,
) -> list[FateRecord]:
    """What training step `step` did with its rollouts. Pure but for the clock.

    `all_skipped`: the gradient of none of its optimizer steps was finite.
    """
    records: list[FateRecord] = []
    votes = [[samples.mean_return for _, samples, _ in group] for group in groups]
    baselines = group_baselines(votes, config.actor.adv_norm)
    for group, baseline in zip(groups, baselines, strict=True):
        for trajectory, samples, exactness in group:
            num_moved = sum(
                int(np.count_nonzero(baseline.advantages(sample.returns)[sample.loss_mask]))
                for sample in samples.samples
            )
            num_trained = exactness.num_verbatim if config.actor.kl_ctl > 0 else num_moved
            reason = ""
            if not exactness.num_verbatim:
                fate = Fate.UNCERTIFIED
            elif all_skipped:
                fate, num_trained = Fate.SKIPPED, 0
            elif num_trained:
                fate = Fate.TRAINED
            else:
                fate = Fate.NO_SIGNAL
                reason = (
                    "all of its group did equally well"
                    if baseline.degenerate
                    else "it did exactly as well as its group on average"
                )
            records.append(
                FateRecord(
                    rollout_id=trajectory.open.rollout_id,
                    fate=fate,
                    reason=reason,
                    policy_version=step - 1,
                    decided_at=time.time(),
                    step=step,
                    staleness=staleness(step - 1, trajectory.oldest_version),
                    num_trained_tokens=num_trained,
                    num_uncertified_tokens=exactness.masked.get(Masked.NOT_VERBATIM, 0),
                    baseline_mean=baseline.mean,
                    baseline_scale=baseline.scale,
                    failure_reward=None if _completed(trajectory) else trajectory.reward,
                    attempt=trajectory.attempt,
                )
            )
    return records


def _completed(trajectory: Trajectory) -> bool:
    return trajectory.end.outcome is Outcome.COMPLETED


def _record(rollout_id: str, fate: Fate, *, version: int, age: int | None = None) -> FateRecord:
    return FateRecord(
        rollout_id=rollout_id,
        fate=fate,
        reason="",
        policy_version=version,
        decided_at=time.time(),
        staleness=age,
    )
