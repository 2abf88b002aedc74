"""Whole runs with programs and with several agents."""

from __future__ import annotations

import json
from collections.abc import Callable

from e2e_run import Run

from areal_sub.records import OpenRecord, decode_record
from areal_sub.trajectory.journal import read_journal

StartRun = Callable[..., Run]
COMMAND = (
    "{argv: [python3, scripted_program.py, '{answer}'], stdin: '{messages}', "
    "env: {PYTHONUNBUFFERED: '1'}}"
)


def test_a_program_trains(start_run: StartRun) -> None:
    run = start_run("workflow=", f"rollout.openai.command={COMMAND}")
    output = run.finish()
    assert run.process.returncode == 0, output
    assert "100.00 % of" in output and "tokens sampled verbatim, 0 masked" in output
    rows = [json.loads(line) for line in (run.root / "metrics.jsonl").read_text().splitlines()]
    assert [row["reward/train"] for row in rows] == [0.25, 0.25]


def test_two_agents_in_one_run_each_in_its_environment(start_run: StartRun) -> None:
    run = start_run(
        "workflow=",
        "rollout.openai.agents.python.workflow=agents_under_test.sync_function",
        f"rollout.openai.agents.program.command={COMMAND}",
        "rollout.openai.agents.program.agent_env=/usr/bin/python3",
        "rollout.openai.sandbox.start=exec",
        "rollout.openai.sandbox.recycle_after=8",
        "rollout.max_head_offpolicyness=0",
        "total_train_steps=6",
        "valid_dataset.size=3",
    )
    output = run.finish()
    assert run.process.returncode == 0, output
    assert "python (50 %), program (50 %), subproc" in output
    rows = [json.loads(line) for line in (run.root / "metrics.jsonl").read_text().splitlines()]
    seen = set()
    for row in rows:
        by_agent = {"python": 1.0, "program": 0.25}
        for name, reward in by_agent.items():
            if f"reward/train/{name}" in row:
                seen.add(name)
                assert row[f"reward/train/{name}"] == reward
        nums = [row.get(f"batch/num_rollouts/{name}", 0) for name in by_agent]
        assert sum(nums) == row["batch/num_rollouts"] and all(num % 4 == 0 for num in nums)
    assert seen == {"python", "program"}
    groups: dict[str, set[str]] = {}
    for _, raw in read_journal(next((run.root / "journal").iterdir())):
        record = decode_record(raw)
        if isinstance(record, OpenRecord) and record.split == "train":
            groups.setdefault(record.group_id, set()).add(record.agent)
    assert all(len(names) == 1 for names in groups.values()), "a group is one agent's"
