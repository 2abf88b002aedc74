"""Rollouts of a recorded run, to train from instead of running agents: `rollout.replay_from`.

Each is recorded again in the run that trains from it, under an id of that run, so that accounting,
inspection and recovery know no difference. Groups come in the order of the recorded run, again and
again; their records are kept in memory, as bytes. Called by the trainer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from areal_sub.errors import ConfigError
from areal_sub.records import (
    EndRecord,
    IntentRecord,
    OpenRecord,
    decode_record,
    encode_record,
    renamed,
)
from areal_sub.rollout.attempt import Assignment
from areal_sub.trajectory.journal import read_journal
from areal_sub.trajectory.resume import slot_of


@dataclass(slots=True)
class _Group:
    task_id: str
    members: dict[str, list[bytes]] = field(default_factory=dict)  # by place in the group


class RecordedGroups:
    """The groups of a run that have `num_samples` rollouts that ended, or more."""

    def __init__(self, run: Path, num_samples: int) -> None:
        """Raises `ConfigError` where there is none, `RecordError` where a journal is damaged."""
        journals = sorted((run / "journal").glob("[0-9]*.journal"))
        if not journals:
            raise ConfigError(f"rollout.replay_from={run}: it is not the folder of a run")
        groups: dict[str, _Group] = {}
        for path in journals:  # of a place that several attempts ended, the latest counts
            _read(path, groups)
        whole = {name: group for name, group in groups.items() if len(group.members) >= num_samples}
        self.num_left_out = len(groups) - len(whole)
        self._groups = [(group.task_id, list(group.members.values())) for group in whole.values()]
        if not self._groups:
            raise ConfigError(
                f"rollout.replay_from={run}: of its {len(groups)} groups none has "
                f"gconfig.n_samples={num_samples} rollouts that ended"
            )

    def __len__(self) -> int:
        return len(self._groups)

    def task_id(self, number: int) -> str:
        return self._groups[number % len(self)][0]

    def records(self, assignment: Assignment) -> list[bytes]:
        """The rollout that stands for the assignment, with its ids."""
        number = int(assignment.group_id[1:])
        place = int(slot_of(assignment.rollout_id).rpartition("-")[2])
        _, members = self._groups[number % len(self)]
        records = [decode_record(raw) for raw in members[place % len(members)]]
        return [
            encode_record(
                renamed(record, rollout_id=assignment.rollout_id, group_id=assignment.group_id)
            )
            for record in records
        ]


def _read(path: Path, groups: dict[str, _Group]) -> None:
    running: dict[str, tuple[OpenRecord, list[bytes]]] = {}
    for _, raw in read_journal(path):
        record = decode_record(raw)
        if isinstance(record, OpenRecord):
            if record.split == "train":
                running[record.rollout_id] = (record, [raw])
        elif record.rollout_id in running and not isinstance(record, IntentRecord):
            opened, records = running[record.rollout_id]
            records.append(raw)
            if isinstance(record, EndRecord):
                del running[record.rollout_id]
                group = groups.setdefault(opened.group_id, _Group(opened.task_id))
                group.members[slot_of(opened.rollout_id)] = records
