"""Whole runs with programs and with several agents."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable

import pytest
from e2e_run import Run

from areal_sub.records import OpenRecord, decode_record
from areal_sub.trajectory.journal import read_journal
from sandbox import PlanError, SandboxSpec
from sandbox.plan import plan
from sandbox.probe import probe

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


NODE = """
fetch(process.env.OPENAI_BASE_URL + "/chat/completions", {
  method: "POST",
  headers: {"content-type": "application/json", authorization: "Bearer {api_key}"},
  body: JSON.stringify({model: "{model}", max_tokens: 4, messages: JSON.parse(process.argv[2])}),
}).then((answer) => answer.json()).then((answer) => {
  console.log(JSON.stringify({reward: {[answer.id]: 0.75}}));
});
"""


@pytest.fixture
def in_namespaces() -> str:
    """The override that asks for that tier, and nothing less."""
    try:
        plan(SandboxSpec(tier="namespaces"), probe())
    except PlanError as error:
        pytest.skip(str(error))
    return "rollout.openai.sandbox.tier=namespaces"


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node on this machine")
def test_a_node_program_trains_in_namespaces(start_run: StartRun, in_namespaces: str) -> None:
    """Its `fetch` reserves more address space than the child may use memory."""
    command = {"argv": ["node", "agent.js", "{messages}"], "files": {"agent.js": NODE}}
    run = start_run(
        "workflow=",
        f"rollout.openai.command={json.dumps(command)}",
        "total_train_steps=1",
        in_namespaces,
    )
    output = run.finish()
    assert run.process.returncode == 0, output
    assert "training reward    0.750" in output


def test_an_openai_agent_with_tools_trains_in_namespaces(
    start_run: StartRun, in_namespaces: str
) -> None:
    """Written for OpenAI's SDK alone: it finds the proxy by the environment."""
    run = start_run(
        "workflow=areal_sub.workflow.openai.math_agent.MathToolAgent",
        "total_train_steps=1",
        in_namespaces,
    )
    output = run.finish()
    assert run.process.returncode == 0, output
    assert "100.00 % of" in output and "tokens sampled verbatim, 0 masked" in output


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
    summary = output.partition("training reward")[2]
    assert re.search(r"program +0\.250 → 0\.250 .* \d+ rollouts", summary), output
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
    (journal,) = (run.root / "journal").glob("*.journal")
    for _, raw in read_journal(journal):
        record = decode_record(raw)
        if isinstance(record, OpenRecord) and record.split == "train":
            groups.setdefault(record.group_id, set()).add(record.agent)
    assert all(len(names) == 1 for names in groups.values()), "a group is one agent's"
