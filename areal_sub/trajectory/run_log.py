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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from areal_sub.errors import RecordError
from areal_sub.records import (
    BeganRecord,
    ClosedRecord,
    EndRecord,
    FateRecord,
    Fork,
    LedgerRecord,
    OpenRecord,
    TrajectoryRecord,
    TurnRecord,
    decode_ledger_record,
    decode_record,
)
from areal_sub.trajectory.journal import HEADER_BYTES, has_writer, read_journal


@dataclass(slots=True, kw_only=True)
class RolloutLog:
    """One rollout: what the proxy recorded of it, and what the trainer decided."""

    opened: OpenRecord
    end: EndRecord | None = None  # without what the agent printed
    num_turns: int = 0
    num_sampled_tokens: int = 0
    forks: Counter[Fork] = field(default_factory=Counter)
    decisions: list[FateRecord] = field(default_factory=list)


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
    damage: list[str] = field(default_factory=list)  # what could not be read


def read_run(journals: Path) -> list[AttemptLog]:
    """The attempts of the run whose folder of journals this is, oldest first."""
    numbers = sorted({int(p.stem) for p in journals.glob("[0-9]*.*") if p.stem.isdecimal()})
    return [_read_attempt(journals, number) for number in numbers]


def _read_attempt(journals: Path, number: int) -> AttemptLog:
    journal, ledger = (journals / f"{number:04d}.{kind}" for kind in ("journal", "ledger"))
    # The ledger is read first: what it decides on has been in the journal for long.
    is_live = ledger.exists() and has_writer(ledger)
    decided, damage = _records_of_ledger(ledger)
    attempt = AttemptLog(number=number, journal=journal, is_live=is_live, damage=damage)
    try:
        for record in _records(journal):
            _take(attempt, record)
    except RecordError as error:
        attempt.damage.append(str(error))
    for entry in decided:
        if isinstance(entry, BeganRecord):
            attempt.began = entry
        elif isinstance(entry, ClosedRecord):
            attempt.closed = entry
        elif entry.rollout_id in attempt.rollouts:
            attempt.rollouts[entry.rollout_id].decisions.append(entry)
        else:
            attempt.strays.append(entry)
    return attempt


def _records_of_ledger(path: Path) -> tuple[list[LedgerRecord], list[str]]:
    records: list[LedgerRecord] = []
    try:
        records.extend(decode_ledger_record(raw) for raw in _payloads(path))
    except RecordError as error:
        return records, [str(error)]
    return records, []


def _records(path: Path) -> Iterator[TrajectoryRecord]:
    return (decode_record(raw) for raw in _payloads(path))


def _payloads(path: Path) -> Iterator[bytes]:
    """None of a file that is not there, or that its writer has only just made."""
    if path.exists() and path.stat().st_size >= HEADER_BYTES:
        for _, raw in read_journal(path):
            yield raw


def _take(attempt: AttemptLog, record: TrajectoryRecord) -> None:
    if isinstance(record, OpenRecord):
        attempt.rollouts[record.rollout_id] = RolloutLog(opened=record)
        return
    log = attempt.rollouts.get(record.rollout_id)
    if log is None:
        raise RecordError(
            f"journal {attempt.journal}: a {record.KIND} record of rollout {record.rollout_id}, "
            "which was never opened"
        )
    if isinstance(record, TurnRecord):
        log.num_turns += 1
        log.num_sampled_tokens += len(record.token_ids)
        log.forks[record.fork] += 1
    else:
        log.end = dataclasses.replace(record, traceback="", stdout_tail="", stderr_tail="")


def read_rollout(
    journal: Path, rollout_id: str
) -> tuple[OpenRecord, list[TurnRecord], EndRecord | None]:
    """All records of one rollout; without an end where it goes on, or was lost.

    Raises `RecordError` where it is not in the journal, or the journal is damaged before its end.
    """
    opened: OpenRecord | None = None
    turns: list[TurnRecord] = []
    for record in _records(journal):
        if record.rollout_id != rollout_id:
            continue
        if isinstance(record, OpenRecord):
            opened = record
        elif isinstance(record, TurnRecord):
            turns.append(record)
        elif opened is not None:
            return opened, turns, record
    if opened is None:
        raise RecordError(f"journal {journal}: there is no rollout {rollout_id}")
    return opened, turns, None
