"""What a run's folder says of its rollouts: journals and ledgers, read and put side by side.

A run has attempts (it is resumed after a crash); each has a journal, which the proxy writes, and a
ledger, which the trainer writes. Rollout ids are unique within an attempt only: a resumed run takes
tasks again. Of each rollout numbers are kept, not tokens, so a log of 20,000 rollouts is small;
`read_rollout` goes back for one rollout's tokens. May be used while the run goes on.

Called at the end of each run (`trainer`), and by `areal-sub inspect`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from areal_sub.errors import RecordError
from areal_sub.records import (
    BeganRecord,
    ClosedRecord,
    EndRecord,
    Fate,
    FateRecord,
    Fork,
    IntentRecord,
    OpenRecord,
    TrajectoryRecord,
    TurnRecord,
    decode_ledger_record,
    decode_record,
)
from areal_sub.trajectory.journal import has_writer, journal_begin, read_journal

T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class RolloutLog:
    """One rollout: what the proxy recorded of it, and what the trainer decided."""

    opened: OpenRecord
    end: EndRecord | None = None  # without what the agent printed
    num_turns: int = 0
    num_sampled_tokens: int = 0
    forks: Counter[Fork] = field(default_factory=Counter)
    decisions: list[FateRecord] = field(default_factory=list)
    taken_over: list[tuple[int, FateRecord]] = field(default_factory=list)
    """Decisions of later attempts (by number) that went on with it, in their order."""
    unanswered: dict[str, None] = field(default_factory=dict)
    """Ids of turns that an engine was asked for and that never came: no token of them is there."""


@dataclass(slots=True, kw_only=True)
class AttemptLog:
    """One attempt of a run."""

    number: int  # 1, 2, ...
    journal: Path
    is_live: bool  # its trainer is running
    began: BeganRecord | None = None
    closed: ClosedRecord | None = None
    rollouts: dict[str, RolloutLog] = field(default_factory=dict)  # in order of opening
    strays: list[FateRecord] = field(default_factory=list)  # of rollouts that were never opened
    of_others: list[FateRecord] = field(default_factory=list)  # of earlier attempts' rollouts
    retired: list[FateRecord] = field(default_factory=list)
    """Of rollouts whose records were removed from the journal (`journal.retain_bytes`)."""
    damage: list[str] = field(default_factory=list)  # what could not be read
    is_ledger_damaged: bool = False


def read_run(journals: Path) -> list[AttemptLog]:
    """The attempts of the run whose folder of journals this is, oldest first."""
    numbers = sorted({int(p.stem) for p in journals.glob("[0-9]*.*") if p.stem.isdecimal()})
    attempts = {number: _read_attempt(journals, number) for number in numbers}
    for attempt in attempts.values():
        for entry in attempt.of_others:
            source = attempts.get(entry.attempt)
            log = source.rollouts.get(entry.rollout_id) if source is not None else None
            if log is None:
                attempt.strays.append(entry)
            else:
                log.taken_over.append((attempt.number, entry))
    return list(attempts.values())


def _read_attempt(journals: Path, number: int) -> AttemptLog:
    journal, ledger = (journals / f"{number:04d}.{kind}" for kind in ("journal", "ledger"))
    # The ledger is read first: what it decides on has been in the journal for long.
    is_live = ledger.exists() and has_writer(ledger)
    damage: list[str] = []
    decided = list(_decoded(ledger, decode_ledger_record, damage))
    attempt = AttemptLog(
        number=number,
        journal=journal,
        is_live=is_live,
        damage=damage,
        is_ledger_damaged=bool(damage),
    )
    # What was removed as done with, or cannot be read, leaves records of rollouts without a begin.
    has_gaps = journal_begin(journal) > 0
    for record in _decoded(journal, decode_record, damage):
        if not _take(attempt, record) and not (has_gaps or damage):
            damage.append(
                f"journal {journal}: a {record.KIND} record of rollout {record.rollout_id}, "
                "which was never opened"
            )
    for entry in decided:
        if isinstance(entry, BeganRecord):
            attempt.began = entry
        elif isinstance(entry, ClosedRecord):
            attempt.closed = entry
        elif entry.attempt:
            attempt.of_others.append(entry)
        elif entry.rollout_id in attempt.rollouts:
            attempt.rollouts[entry.rollout_id].decisions.append(entry)
        elif has_gaps and entry.fate is not Fate.UNUSED:
            attempt.retired.append(entry)
        else:
            attempt.strays.append(entry)
    return attempt


def _decoded(path: Path, decode: Callable[[bytes], T], damage: list[str]) -> Iterator[T]:
    """The journal's records. What cannot be read is told to `damage`."""
    try:
        for _, raw in read_journal(path, damage=damage):
            yield decode(raw)
    except RecordError as error:
        damage.append(str(error))


def _take(attempt: AttemptLog, record: TrajectoryRecord) -> bool:
    """Whether the record's rollout is known."""
    if isinstance(record, OpenRecord):
        attempt.rollouts[record.rollout_id] = RolloutLog(opened=record)
        return True
    log = attempt.rollouts.get(record.rollout_id)
    if log is None:
        return False
    if isinstance(record, IntentRecord):
        log.unanswered[record.turn_id] = None
    elif isinstance(record, TurnRecord):
        log.unanswered.pop(record.turn_id, None)
        log.num_turns += 1
        log.num_sampled_tokens += len(record.token_ids)
        log.forks[record.fork] += 1
    else:
        log.end = dataclasses.replace(record, traceback="", stdout_tail="", stderr_tail="")
    return True


def read_rollout(
    journal: Path, rollout_id: str
) -> tuple[OpenRecord, list[TurnRecord], EndRecord | None]:
    """All records of one rollout; without an end where it goes on, or was lost.

    Raises `RecordError` where it is not in the journal, or the journal is damaged before its end.
    """
    opened: OpenRecord | None = None
    turns: list[TurnRecord] = []
    damage: list[str] = []
    for record in _decoded(journal, decode_record, damage):
        if record.rollout_id != rollout_id or isinstance(record, IntentRecord):
            continue
        if isinstance(record, OpenRecord):
            opened = record
        elif isinstance(record, TurnRecord):
            turns.append(record)
        elif opened is not None:
            return opened, turns, record
    if damage:
        raise RecordError(damage[0])
    if opened is None:
        raise RecordError(f"journal {journal}: there is no rollout {rollout_id}")
    return opened, turns, None
