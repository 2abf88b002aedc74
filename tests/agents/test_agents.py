"""Each real agent, unmodified, trains a step: sandboxed children, the proxy, the embedded engine.

For each: every rollout ended well, every call was captured and is its rollout's, none forked, and
what was trained is what was sampled. What was seen becomes the table of docs/compatibility.md.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_run import REPO, Run
from real_agents import AGENTS, CODING, HERE, Agent

from areal_sub.errors import WorkflowError
from areal_sub.records import EndRecord, Fork, OpenRecord, Outcome, TurnRecord, decode_record
from areal_sub.rollout.environments import cache_folder, prepare
from areal_sub.rollout.interpreters import find_python
from areal_sub.trajectory.journal import read_journal

BUILD_TIMEOUT_S = 900.0
RUN_TIMEOUT_S = 600.0
NUM_ROLLOUTS = 8

pytestmark = [pytest.mark.agents, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("agent", AGENTS, ids=lambda agent: agent.name)
def test_an_agent_trains_token_exactly(
    agent: Agent, short_tmp: Path, policies: Callable[[str], Path]
) -> None:
    python = interpreter_for(agent)
    prepare(
        str(HERE / agent.agent_env),
        python,
        cache=cache_folder(os.environ),
        timeout_s=BUILD_TIMEOUT_S,
        say=print,
    )
    run = start(agent, python, short_tmp, policies)
    output = run.finish(RUN_TIMEOUT_S)
    assert run.process.returncode == 0, output

    opened, turns, ends = journal_of(run)
    ends_of = {end.rollout_id: end for end in ends}
    assert {end.rollout_id for end in ends} == set(opened)
    # The trainer admits rollouts ahead of the last step, and stops them with the run.
    completed = {end.rollout_id for end in ends if end.outcome is not Outcome.CANCELLED}
    assert {end.outcome for end in ends if end.rollout_id in completed} == {Outcome.COMPLETED}
    trained = [each for each in completed if opened[each].split == "train"]
    assert len(trained) >= NUM_ROLLOUTS, output

    num_turns = Counter(turn.rollout_id for turn in turns)
    assert completed <= set(num_turns), "a rollout without a captured call"
    assert {end.rollout_id: end.num_turns for end in ends if end.num_turns} == num_turns
    assert sum(end.num_rejected_calls for end in ends) == 0
    assert {turn.dialect for turn in turns} == set(agent.dialects)
    assert {turn.streamed for turn in turns} == {agent.streamed}
    if agent.script:
        assert {ends_of[each].reward for each in trained} == {0.0, 1.0}, (
            "the grader sees no difference"
        )
    if agent.has_tools:
        assert max(num_turns.values()) > 1, "no rollout used the tool"

    forks = Counter(turn.fork for turn in turns if turn.fork not in (Fork.ROOT, Fork.NONE))
    assert not forks
    exactness = re.search(r"([\d.]+) % of (\d+) trained tokens sampled", output)
    assert exactness is not None, output
    assert exactness[1] == "100.00" and int(exactness[2]) > 0
    write_seen(agent, **what_was_seen(turns, len(num_turns), exactness[1]))


def start(agent: Agent, python: str | None, folder: Path, policies: Callable[[str], Path]) -> Run:
    overrides = [
        "rollout.openai.sandbox.tier=namespaces",
        "rollout.max_head_offpolicyness=0",
        "total_train_steps=1",
        *([f"rollout.openai.agent_python={python}"] if python else []),
        *agent.overrides,
    ]
    if not agent.config:
        return Run(
            folder,
            policies("calculator"),
            f"workflow={agent.workflow}",
            f"rollout.openai.agent_env={HERE / agent.agent_env}",
            "rollout.timeout_s=60",
            "gconfig.max_new_tokens=48",
            *overrides,
        )
    script = folder / "script.json"
    script.write_text(json.dumps(agent.script))
    return Run(
        folder,
        policies("prose"),
        "experiment_name=e2e",
        "trial_name=run",
        "gconfig.max_new_tokens=200",
        "actor.dtype=float32",
        "actor.num_threads=1",
        "engine.num_threads=1",
        *overrides,
        config=CODING / agent.config,
        cwd=REPO,
        program=(str(HERE / "scripted_train.py"),),
        variables={"AREAL_SUB_SCRIPT": str(script), "PYTHONPATH": f"{HERE}:{REPO}"},
    )


def interpreter_for(agent: Agent) -> str | None:
    """None: our own. Where none of those that it needs is there, the table says so."""
    for version in agent.pythons:
        try:
            return str(find_python(version))
        except WorkflowError:
            continue
    if not agent.pythons:
        return None
    missing = f"not run: there is no Python {agent.pythons[0]} or newer"
    write_seen(agent, turns=missing, **dict.fromkeys(("dialect", "streamed", "forks", "exact"), ""))
    pytest.skip(missing)


def journal_of(run: Run) -> tuple[dict[str, OpenRecord], list[TurnRecord], list[EndRecord]]:
    records = [
        decode_record(raw)
        for path in (run.root / "journal").glob("*.journal")
        for _, raw in read_journal(path)
    ]
    opened = {each.rollout_id: each for each in records if isinstance(each, OpenRecord)}
    turns = [each for each in records if isinstance(each, TurnRecord)]
    return opened, turns, [each for each in records if isinstance(each, EndRecord)]


def what_was_seen(turns: list[TurnRecord], num_rollouts: int, share: str) -> dict[str, str]:
    forks = Counter(str(turn.fork) for turn in turns if turn.fork not in (Fork.ROOT, Fork.NONE))
    return {
        "dialect": ", ".join(sorted({turn.dialect for turn in turns})),
        "streamed": "yes" if all(turn.streamed for turn in turns) else "no",
        "turns": f"{len(turns)} in {num_rollouts} rollouts",
        "forks": ", ".join(f"{count} {name}" for name, count in forks.items()) or "none",
        "exact": f"{share} %",
    }


def write_seen(agent: Agent, **seen: str) -> None:
    """For `write_agents.py`, where `tests/agents/run` wants one."""
    folder = os.environ.get("AREAL_SUB_SEEN")
    if folder:
        row = {"agent": agent.name, "version": f"{agent.package} {agent.version}", **seen}
        (Path(folder) / f"{AGENTS.index(agent):03}.json").write_text(json.dumps(row))
