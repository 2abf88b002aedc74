"""What became of each rollout of a run, and whether all of them are accounted for. Pure.

The identity: rollouts started = trained + not trained, each by a named reason. Two writers say what
happened: the proxy's journal says what was started and how it ended, the trainer's ledger what it
decided. Where they do not fit together there is a problem, which names the rollouts.

Called at the end of each run (`trainer`), and by `areal-sub inspect`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from areal_sub.records import Fate, FateRecord, Outcome
from areal_sub.trajectory.run_log import AttemptLog, RolloutLog

_MAX_NAMED = 3  # rollouts that a problem names


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What became of one rollout, and why."""

    attempt: AttemptLog
    rollout: RolloutLog
    fate: Fate
    reason: str  # "" or one line

    @property
    def label(self) -> str:
        """The fate's name; of a failed rollout its outcome's."""
        end = self.rollout.end
        return str(end.outcome if self.fate is Fate.FAILED and end is not None else self.fate)

    @property
    def decision(self) -> FateRecord | None:
        return last_decision(self.rollout)


@dataclass(frozen=True, slots=True, kw_only=True)
class Accounting:
    """The sum of a run."""

    num_started: int
    fates: dict[str, int]  # label → rollouts: first those trained, then the most frequent
    problems: tuple[str, ...]  # empty: it adds up

    def __str__(self) -> str:
        parts = " + ".join(f"{count} {label}" for label, count in self.fates.items())
        return f"{self.num_started} started = {parts or '0'}"


def judge_run(attempts: Sequence[AttemptLog]) -> list[Judgement]:
    """Every rollout that was started, in order of opening."""
    known = {attempt.number: attempt for attempt in attempts}
    went_on_from = _went_on_from(attempts)
    judgements: list[Judgement] = []
    for attempt in attempts:
        for log in attempt.rollouts.values():
            # Where a later attempt has taken it over, that one has decided.
            number = log.taken_over[-1][0] if log.taken_over else attempt.number
            fate, reason = _fate(known[number], log, went_on_from[number])
            judgements.append(Judgement(attempt=attempt, rollout=log, fate=fate, reason=reason))
    return judgements


def last_decision(log: RolloutLog) -> FateRecord | None:
    if log.taken_over:
        return log.taken_over[-1][1]
    return log.decisions[-1] if log.decisions else None


def _went_on_from(attempts: Sequence[AttemptLog]) -> dict[int, int | None]:
    """Of each attempt's number: the smallest version that a later one began with."""
    smallest: dict[int, int | None] = {}
    version: int | None = None
    for attempt in reversed(attempts):
        smallest[attempt.number] = version
        if attempt.began is not None:
            began = attempt.began.policy_version
            version = began if version is None else min(version, began)
    return smallest


def account(attempts: Sequence[AttemptLog], judgements: Sequence[Judgement]) -> Accounting:
    """`judgements`: of `attempts`, by `judge_run`."""
    counts = Counter(judgement.label for judgement in judgements)
    retired = [record for attempt in attempts for record in attempt.retired]
    counts.update(str(record.fate) for record in retired)
    trained = {str(Fate.TRAINED): counts.pop(Fate.TRAINED, 0)}
    return Accounting(
        num_started=sum(len(attempt.rollouts) for attempt in attempts) + len(retired),
        fates=trained | dict(counts.most_common()),
        problems=tuple(_problems(attempts, judgements)),
    )


def _fate(attempt: AttemptLog, log: RolloutLog, went_on_from: int | None) -> tuple[Fate, str]:
    """`attempt`: the last one that had to do with it."""
    end = log.end
    failed = end is not None and end.outcome is not Outcome.COMPLETED
    decision = last_decision(log)
    if decision is None or decision.fate is Fate.UNUSED:
        if end is not None and failed and (decision or end.outcome is Outcome.CANCELLED):
            return Fate.FAILED, end.error
        if attempt.is_live:
            return (Fate.RUNNING if end is None else Fate.WAITING), ""
        if attempt.is_ledger_damaged and decision is None:
            return Fate.UNACCOUNTED, "the ledger is damaged, which may have told it"
        if attempt.closed is None and attempt.began is not None:
            return Fate.CRASHED, "the trainer was killed"
        if end is None and attempt.closed is not None and attempt.closed.ended == "failed":
            return Fate.CRASHED, attempt.closed.error
        if end is None or decision is None:
            return Fate.UNACCOUNTED, "" if attempt.began else "this run has no ledger"
        return Fate.UNUSED, decision.reason
    if decision.fate is Fate.FAILED and end is not None:
        return Fate.FAILED, end.error
    if decision.fate is Fate.TRAINED and _is_undone(decision, went_on_from):
        return Fate.UNDONE, f"trained in step {decision.step}; the run went on from {went_on_from}"
    return decision.fate, decision.reason


def _problems(attempts: Sequence[AttemptLog], judgements: Sequence[Judgement]) -> Iterable[str]:
    for attempt in attempts:
        yield from attempt.damage
    strays = [r for a in attempts for r in a.strays if r.fate is not Fate.UNUSED]
    if strays:
        yield f"decided on, but never opened: {_names(r.rollout_id for r in strays)}"
    twice = [j for j in judgements if _is_decided_twice(j.rollout)]
    if twice:
        yield f"decided on more than once: {_names(j.rollout.opened.rollout_id for j in twice)}"
    went_on_from = _went_on_from(attempts)
    trained = [j for j in judgements if j not in twice and _num_trained(j, went_on_from) > 1]
    if trained:
        yield f"trained more than once: {_names(j.rollout.opened.rollout_id for j in trained)}"
    lost = [j for j in judgements if j.fate is Fate.UNACCOUNTED]
    if lost:
        yield f"nobody decided on: {_names(j.rollout.opened.rollout_id for j in lost)}"
    wrong = [j for j in judgements if j.fate in _LEARNED and not _may_train(j.rollout)]
    if wrong:
        names = _names(j.rollout.opened.rollout_id for j in wrong)
        yield f"in a training step, but failed or not for training: {names}"


_LEARNED = (Fate.TRAINED, Fate.UNDONE, Fate.NO_SIGNAL)


def _is_undone(decision: FateRecord, went_on_from: int | None) -> bool:
    return went_on_from is not None and decision.step > went_on_from


def _is_decided_twice(log: RolloutLog) -> bool:
    """By one attempt: a later one may take it over, if the step that it was in is undone."""
    by = [number for number, _ in log.taken_over]
    return len(log.decisions) > 1 or len(by) > len(set(by))


def _num_trained(judgement: Judgement, went_on_from: Mapping[int, int | None]) -> int:
    """In how many training steps that were not undone it is."""
    log, number = judgement.rollout, judgement.attempt.number
    decisions = [(number, decision) for decision in log.decisions] + log.taken_over
    return sum(
        decision.fate in _LEARNED and not _is_undone(decision, went_on_from[by])
        for by, decision in decisions
    )


def _may_train(log: RolloutLog) -> bool:
    decision = last_decision(log)
    rewarded = decision is not None and decision.failure_reward is not None
    completed = log.end is not None and (log.end.outcome is Outcome.COMPLETED or rewarded)
    return completed and log.opened.split == "train"


def _names(rollout_ids: Iterable[str]) -> str:
    names = list(rollout_ids)
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return f"{len(names)} rollouts ({', '.join(names[:_MAX_NAMED])}{more})"
