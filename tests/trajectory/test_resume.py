"""What a run that is resumed takes over from its earlier attempts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from areal_sub.records import (
    BeganRecord,
    EndRecord,
    Fork,
    IntentRecord,
    OpenRecord,
    Outcome,
    TrajectoryRecord,
    TurnRecord,
    float32,
    int32,
)
from areal_sub.trajectory.journal import Journal, segment_files
from areal_sub.trajectory.resume import RunPosition, finished_rollouts
from areal_sub.trajectory.run_log import read_run


def opened(rollout_id: str, split: str = "train") -> OpenRecord:
    return OpenRecord(
        rollout_id=rollout_id, group_id=rollout_id.partition("-")[0], task_id="t", split=split,
        policy_version=0, opened_at=0.0,
    )  # fmt: skip


def turn(rollout_id: str, *versions: int) -> TurnRecord:
    num = len(versions)
    return TurnRecord(
        rollout_id=rollout_id, turn_id="t", parent_turn_id=None, fork=Fork.ROOT,
        context_token_ids=int32([1]), token_ids=int32([2] * num),
        rollout_logprobs=float32([0.0] * num), versions=int32(versions), finish_reason="stop",
        dialect="chat", model="m", temperature=1.0, top_p=1.0, started_at=0.0, ended_at=0.0,
        num_prompt_tokens=1,
    )  # fmt: skip


def ended(rollout_id: str, outcome: Outcome = Outcome.COMPLETED) -> EndRecord:
    return EndRecord.without_process(rollout_id, outcome, reward=1.0, num_turns=1)


def whole(rollout_id: str, *versions: int, **ending: Outcome) -> list[TrajectoryRecord]:
    return [opened(rollout_id), turn(rollout_id, *(versions or (0,))), ended(rollout_id, **ending)]


def attempt(folder: Path, number: int, version: int, records: Sequence[TrajectoryRecord]) -> None:
    began = BeganRecord(
        policy_version=version, began_at=0.0, export_style="concat", turn_discount=1.0,
        trains_without_advantage=False, tokenizer_path="",
    )  # fmt: skip
    for kind, content in (("journal", records), ("ledger", [began])):
        journal = Journal(folder / f"{number:04d}.{kind}")
        for record in content:
            journal.append(record)  # type: ignore[arg-type]
        journal.close()


def left(folder: Path, position: RunPosition) -> dict[str, list[str]]:
    finished, damage = finished_rollouts(read_run(folder), position)
    assert damage == []
    return {
        group: sorted(f"{t.attempt}/{t.open.rollout_id}" for t in own)
        for group, own in sorted(finished.items())
    }


def test_only_what_has_ended_of_groups_that_are_open(tmp_path: Path) -> None:
    asked = IntentRecord(rollout_id="g000007-1", turn_id="x", num_prompt_tokens=1, asked_at=0.0)
    attempt(
        tmp_path,
        1,
        0,
        [
            *whole("g000003-0"),  # trained
            *whole("g000007-0"),
            opened("g000007-1"), turn("g000007-1", 0), asked,  # it was running
            *whole("g000007-2", outcome=Outcome.LOST),
            *whole("g000007-2~1"),
            *whole("g000012-0", outcome=Outcome.EXCEPTION),  # the agent's own fault
            opened("v000001-000000-0", "valid"), ended("v000001-000000-0"),
        ],
    )  # fmt: skip
    position = RunPosition(version=2, num_started=10, pending=(7,))
    assert left(tmp_path, position) == {
        "g000007": ["1/g000007-0", "1/g000007-2~1"],
        "g000012": ["1/g000012-0"],
    }
    unknown = RunPosition.from_map({"version": 2, "num_given_up": 1}, batch_size=4)
    assert unknown.num_started == 9 and left(tmp_path, unknown) == {}
    assert RunPosition.from_map(position.to_map(), batch_size=4) == position


def test_the_latest_end_counts_and_undone_versions_are_far(tmp_path: Path) -> None:
    attempt(
        tmp_path, 1, 0, [*whole("g000000-0", 5, 7), *whole("g000000-1", 4), *whole("g000000-2")]
    )
    attempt(tmp_path, 2, 5, [*whole("g000000-0", 6)])
    finished, _ = finished_rollouts(read_run(tmp_path), RunPosition(version=6))
    ages = {(t.attempt, t.open.rollout_id): 6 - t.oldest_version for t in finished["g000000"]}
    # 6 of the second attempt is the one that goes on; 7 of the first went from 5 another way.
    assert ages == {(2, "g000000-0"): 0, (1, "g000000-1"): 2, (1, "g000000-2"): 6}
    finished, _ = finished_rollouts(read_run(tmp_path)[:1], RunPosition(version=5))
    (one,) = [t for t in finished["g000000"] if t.open.rollout_id == "g000000-0"]
    assert one.oldest_version == 3


def test_what_a_damaged_file_hides_is_told_and_the_rest_is_taken(tmp_path: Path) -> None:
    attempt(tmp_path, 1, 0, [*whole("g000000-0"), *whole("g000000-1"), *whole("g000000-2")])
    (file,) = segment_files(tmp_path / "0001.journal")
    raw = bytearray(file.read_bytes())
    raw[raw.index(b"g000000-1") + 200] ^= 1
    file.write_bytes(raw)
    finished, damage = finished_rollouts(read_run(tmp_path), RunPosition())
    assert [t.open.rollout_id for t in finished["g000000"]] == ["g000000-0"]
    assert len(damage) == 1 and "damaged" in damage[0]


def test_a_first_attempt_has_nothing_to_take_over(tmp_path: Path) -> None:
    assert finished_rollouts([], RunPosition()) == ({}, [])
    assert dataclasses.asdict(RunPosition())["pending"] == ()
