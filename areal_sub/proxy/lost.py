"""What a proxy's process that went left open: ended, as lost, by the next one. Called at its start.

Rollouts that the journal opened and never ended have lost their sessions, and their keys with them.
Their end records tell the reader of the stream, who stops their agents.
"""

from __future__ import annotations

import time

from areal_sub.records import EndRecord, OpenRecord, Outcome, TurnRecord, decode_record
from areal_sub.trajectory.journal import Journal, read_journal

ERROR = "the proxy's process ended while the rollout was running"


def end_lost(journal: Journal) -> frozenset[str]:
    """Append an end record, of outcome `lost`, for each rollout that has none; their ids.

    Raises `RecordError`.
    """
    num_turns: dict[str, int] = {}
    for _, raw in read_journal(journal.path):
        record = decode_record(raw)
        if isinstance(record, OpenRecord):
            num_turns[record.rollout_id] = 0
        elif isinstance(record, EndRecord):
            num_turns.pop(record.rollout_id, None)
        elif isinstance(record, TurnRecord):
            num_turns[record.rollout_id] = num_turns.get(record.rollout_id, 0) + 1
    for rollout_id, num in num_turns.items():
        journal.append(
            EndRecord.without_process(
                rollout_id, Outcome.LOST, error=ERROR, num_turns=num, ended_at=time.time()
            )
        )
    return frozenset(num_turns)
