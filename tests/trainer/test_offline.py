"""Rollouts of a recorded run, given out again as rollouts of the run that trains from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from areal_sub.errors import ConfigError
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
from areal_sub.rollout.attempt import Assignment
from areal_sub.trainer.offline import RecordedGroups
from areal_sub.trajectory.journal import Journal
from areal_sub.trajectory.tree import Trajectory


def opened(rollout_id: str, split: str = "train") -> OpenRecord:
    group_id = rollout_id.partition("-")[0]
    return OpenRecord(
        rollout_id=rollout_id, group_id=group_id, task_id=f"task of {group_id}", split=split,
        policy_version=0, opened_at=0.0,
    )  # fmt: skip


def whole(rollout_id: str, reward: float, split: str = "train") -> list[TrajectoryRecord]:
    turn = TurnRecord(
        rollout_id=rollout_id, turn_id=f"turn of {rollout_id}", parent_turn_id=None,
        fork=Fork.ROOT, context_token_ids=int32([1]), token_ids=int32([2]),
        rollout_logprobs=float32([-0.5]), versions=int32([7]), finish_reason="stop",
        dialect="chat", model="m", temperature=1.0, top_p=1.0, started_at=0.0, ended_at=0.0,
        num_prompt_tokens=1,
    )  # fmt: skip
    asked = IntentRecord(
        rollout_id=rollout_id, turn_id=turn.turn_id, num_prompt_tokens=1, asked_at=0.0
    )
    end = EndRecord.without_process(rollout_id, Outcome.COMPLETED, reward=reward, num_turns=1)
    return [opened(rollout_id, split), asked, turn, end]


def write(run: Path, number: int, *rollouts: Sequence[TrajectoryRecord]) -> None:
    (run / "journal").mkdir(parents=True, exist_ok=True)
    journal = Journal(run / "journal" / f"{number:04d}.journal")
    for records in rollouts:
        for record in records:
            journal.append(record)
    journal.close()


def given(groups: RecordedGroups, rollout_id: str) -> Trajectory:
    group_id = rollout_id.partition("-")[0]
    assignment = Assignment(
        rollout_id=rollout_id, group_id=group_id, task_id="", split="train", data={},
        policy_version=0,
    )  # fmt: skip
    begin, *turns, end = [decode_record(raw) for raw in groups.records(assignment)]
    return Trajectory.build(begin, turns, end)  # type: ignore[arg-type]


def test_whole_groups_come_in_their_order_and_again_under_new_ids(tmp_path: Path) -> None:
    write(
        tmp_path, 1,
        whole("g000004-0", 0.5), whole("g000002-0", 0.0), [opened("g000002-1")],
        whole("g000004-1", 1.0), whole("g000009-0", 0.25), whole("v000001-0", 1.0, "valid"),
    )  # fmt: skip
    write(tmp_path, 2, whole("g000002-1~1", 0.75), whole("g000004-1", 0.1))
    groups = RecordedGroups(tmp_path, 2)
    assert len(groups) == 2 and groups.num_left_out == 1
    assert [groups.task_id(i) for i in range(3)] == [
        "task of g000004", "task of g000002", "task of g000004",
    ]  # fmt: skip
    rewards = {
        name: given(groups, name).reward
        for name in ("g000000-0", "g000000-1", "g000001-0", "g000001-1", "g000002-1")
    }
    assert rewards == {
        "g000000-0": 0.5, "g000000-1": 0.1, "g000001-0": 0.0, "g000001-1": 0.75, "g000002-1": 0.1,
    }  # fmt: skip
    one = given(groups, "g000000-0")
    assert (one.open.rollout_id, one.open.group_id) == ("g000000-0", "g000000")
    assert one.oldest_version == 7 and list(one.turns) == ["turn of g000004-0"]


def test_a_folder_without_groups_to_train_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not the folder of a run"):
        RecordedGroups(tmp_path, 2)
    write(tmp_path, 1, whole("g000000-0", 1.0))
    with pytest.raises(ConfigError, match=r"of its 1 groups none has gconfig\.n_samples=2"):
        RecordedGroups(tmp_path, 2)
