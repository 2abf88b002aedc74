"""What recording costs: rollouts of three turns appended to a journal, by fsync policy.

    python -m benchmarks.journal [--num 400] [--folder DIR]

Prints, for each policy of `journal.fsync`, wall and CPU time per rollout (open, three intents and
turns, end), and the ratio to `never`; and how fast it is read back. `--folder`: on the disk
that is asked about; /tmp may lie in memory.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from areal_sub.records import (
    EndRecord,
    Fork,
    IntentRecord,
    OpenRecord,
    Outcome,
    TrajectoryRecord,
    TurnRecord,
    decode_record,
    float32,
    int32,
)
from areal_sub.trajectory.journal import Journal, JournalPolicy, read_journal

NUM_TURNS = 3
NUM_TOKENS = 200  # sampled, and as many of context, per turn


def rollout(rollout_id: str) -> list[TrajectoryRecord]:
    records: list[TrajectoryRecord] = [
        OpenRecord(
            rollout_id=rollout_id,
            group_id="g",
            task_id="t",
            split="train",
            policy_version=0,
            opened_at=0.0,
        )
    ]
    for i in range(NUM_TURNS):
        turn_id = f"{rollout_id}-{i}"
        records.append(
            IntentRecord(
                rollout_id=rollout_id, turn_id=turn_id, num_prompt_tokens=NUM_TOKENS, asked_at=0.0
            )
        )
        records.append(
            TurnRecord(
                rollout_id=rollout_id,
                turn_id=turn_id,
                parent_turn_id=None,
                fork=Fork.NEW_CONVERSATION,
                context_token_ids=int32(range(NUM_TOKENS)),
                token_ids=int32(range(NUM_TOKENS)),
                rollout_logprobs=float32([0.5] * NUM_TOKENS),
                versions=int32([0] * NUM_TOKENS),
                finish_reason="stop",
                dialect="chat",
                model="m",
                temperature=1.0,
                top_p=1.0,
                started_at=0.0,
                ended_at=0.0,
                num_prompt_tokens=NUM_TOKENS,
            )
        )
    records.append(
        EndRecord.without_process(rollout_id, Outcome.COMPLETED, reward=1.0, num_turns=NUM_TURNS)
    )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num", type=int, default=400, help="rollouts for each policy")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary one")
    args = parser.parse_args()
    rollouts = [rollout(f"r{i}") for i in range(args.num)]
    num_records = sum(map(len, rollouts))
    baseline = 0.0
    print(f"{args.num} rollouts of {NUM_TURNS} turns: {num_records} records")
    for fsync in ("never", "end", "always"):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            journal = Journal(Path(folder) / "journal", JournalPolicy(fsync=fsync))
            wall, cpu = time.perf_counter(), time.process_time()
            for records in rollouts:
                for record in records:
                    journal.append(record)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            journal.close()
            baseline = baseline or wall
            print(
                f"  fsync={fsync:6}  {wall / args.num * 1e3:7.3f} ms wall  "
                f"{cpu / args.num * 1e3:7.3f} ms CPU per rollout  {wall / baseline:6.1f} x never"
            )
            if fsync == "never":
                began = time.process_time()
                size = sum(
                    len(raw) for _, raw in read_journal(journal.path) if bool(decode_record(raw))
                )
                spent = time.process_time() - began
                print(f"  read back     {size / spent / 2**20:7.0f} MiB/s of CPU time, decoded")


if __name__ == "__main__":
    main()
