"""What earlier attempts of a run have left to train: rollouts that had ended and were in no step
that the run went on from.

A recovery point names the groups that it has done with (`RunPosition`). Every other rollout that
has ended is trained yet, once: its group is begun again, finds it, and runs only what it lacks.
Called by the trainer, before it starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from areal_sub.errors import RecordError
from areal_sub.records import (
    EndRecord,
    Fault,
    IntentRecord,
    OpenRecord,
    TurnRecord,
    decode_record,
)
from areal_sub.trajectory.journal import read_journal
from areal_sub.trajectory.run_log import AttemptLog
from areal_sub.trajectory.tree import Trajectory

Finished = dict[str, list[Trajectory]]  # group_id → its rollouts, one per place in the group


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPosition:
    """How far a run has got with its groups, which are numbered in the order of their tasks."""

    version: int = 0
    num_given_up: int = 0  # groups that were replaced
    num_started: int = 0
    pending: tuple[int, ...] = ()  # started, and neither trained nor given up
    takes_over: bool = True  # what earlier attempts left can be told from what they have trained

    def to_map(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "num_given_up": self.num_given_up,
            "num_started": self.num_started,
            "pending": list(self.pending),
        }

    @classmethod
    def from_map(cls, data: Mapping[str, Any], *, batch_size: int) -> RunPosition:
        """Of a recovery point. Where it has no `pending`, it does not say what it has done with."""
        version, num_given_up = data["version"], data["num_given_up"]
        done = version * batch_size + num_given_up
        return cls(
            version=version,
            num_given_up=num_given_up,
            num_started=data.get("num_started", done),
            pending=tuple(data.get("pending", ())),
            takes_over="pending" in data,
        )

    def is_open(self, group_id: str) -> bool:
        """Whether the group has yet to be trained or given up."""
        kind, number = group_id[:1], group_id[1:]
        if kind != "g" or not number.isdecimal():
            return False
        return int(number) >= self.num_started or int(number) in self.pending


def slot_of(rollout_id: str) -> str:
    """A rollout's place in its group, which its attempts share: `g000007-2` of `g000007-2~1`."""
    return rollout_id.partition("~")[0]


def finished_rollouts(
    attempts: list[AttemptLog], position: RunPosition
) -> tuple[Finished, list[str]]:
    """What `attempts`, oldest first, left to train, and what of it could not be read.

    A rollout that our own processes failed is none: it is run again. Where several attempts ended
    the same place of a group, the latest counts.
    """
    finished: Finished = {}
    damage: list[str] = []
    if not position.takes_over:
        return finished, damage
    taken: set[str] = set()
    went_on_from = position.version
    for attempt in reversed(attempts):
        for trajectory in _ended(attempt, position, went_on_from, damage):
            slot = slot_of(trajectory.open.rollout_id)
            if slot not in taken:
                taken.add(slot)
                finished.setdefault(trajectory.open.group_id, []).append(trajectory)
        if attempt.began is not None:
            went_on_from = min(went_on_from, attempt.began.policy_version)
    return finished, damage


def _ended(
    attempt: AttemptLog, position: RunPosition, went_on_from: int, damage: list[str]
) -> list[Trajectory]:
    opened: dict[str, OpenRecord] = {}
    turns: dict[str, list[TurnRecord]] = {}
    ended: list[Trajectory] = []
    for _, raw in read_journal(attempt.journal, damage=damage):
        record = decode_record(raw)
        if isinstance(record, OpenRecord):
            if record.split == "train" and position.is_open(record.group_id):
                opened[record.rollout_id], turns[record.rollout_id] = record, []
        elif record.rollout_id not in opened or isinstance(record, IntentRecord):
            continue
        elif isinstance(record, TurnRecord):
            turns[record.rollout_id].append(record)
        elif isinstance(record, EndRecord):
            begin, own = opened.pop(record.rollout_id), turns.pop(record.rollout_id)
            if record.outcome.fault is Fault.INFRASTRUCTURE:
                continue
            try:
                ended.append(
                    Trajectory.build(
                        begin, own, record, attempt=attempt.number, went_on_from=went_on_from
                    )
                )
            except RecordError as error:  # what lies in a damaged segment is gone from it
                damage.append(str(error))
    return ended
