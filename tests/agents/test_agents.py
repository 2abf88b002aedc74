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
from typing import Any

import pytest
from e2e_run import REPO, Run
from real_agents import AGENTS, CODING, HERE, Agent

from areal_sub.errors import WorkflowError
from areal_sub.records import EndRecord, Fork, OpenRecord, Outcome, TurnRecord, decode_record
from areal_sub.rollout.environments import Environment, cache_folder, prepare
from areal_sub.rollout.interpreters import find_python
from areal_sub.trajectory.journal import read_journal

BUILD_TIMEOUT_S = 900.0
RUN_TIMEOUT_S = 600.0
NUM_ROLLOUTS = 8

pytestmark = [pytest.mark.agents, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("agent", AGENTS, ids=lambda agent: agent.name)
def test_an_agent_trains_token_exactly(
    agent: Agent, runs: Callable[..., Run], policies: Callable[[str], Path]
) -> None:
    python = interpreter_for(agent)
    environment(agent, python)
    run = runs(*start(agent, python, policies), **scripted(agent))
    seen = checked(agent, run)
    write_seen(agent, "subproc", version=f"{agent.package} {agent.version}", **seen)


@pytest.mark.parametrize(
    "agent", [agent for agent in AGENTS if agent.inline], ids=lambda agent: agent.name
)
def test_an_agent_trains_inline(
    agent: Agent, runs: Callable[..., Run], policies: Callable[[str], Path]
) -> None:
    """In the trainer's own process, which has what the agent needs installed."""
    (packages,) = (
        Path(environment(agent, None).python).parents[1].glob("lib/python3*/site-packages")
    )
    run = runs(
        *start(agent, None, policies),
        "rollout.openai.mode=inline",
        "rollout.openai.agent_env=null",
        variables={"PYTHONPATH": str(packages)},
    )
    checked(agent, run)
    write_seen(agent, "inline", inline="yes")


def environment(agent: Agent, python: str | None) -> Environment:
    return prepare(
        str(HERE / agent.agent_env),
        python,
        cache=cache_folder(os.environ),
        timeout_s=BUILD_TIMEOUT_S,
        say=print,
    )


def checked(agent: Agent, run: Run) -> dict[str, str]:
    """What its run shows, for the table; fails where that is not what is claimed."""
    output = run.finish(RUN_TIMEOUT_S)
    assert run.process.returncode == 0, output

    opened, turns, ends = journal_of(run)
    ends_of = {end.rollout_id: end for end in ends}
    assert set(ends_of) == set(opened)
    # The trainer admits rollouts ahead of the last step, and stops them with the run.
    completed = {end.rollout_id for end in ends if end.outcome is not Outcome.CANCELLED}
    assert {ends_of[each].outcome for each in completed} == {Outcome.COMPLETED}
    trained = [each for each in completed if opened[each].split == "train"]
    assert len(trained) >= NUM_ROLLOUTS, output

    num_turns = Counter(turn.rollout_id for turn in turns)
    assert completed <= set(num_turns), "a rollout without a captured call"
    assert {end.rollout_id: end.num_turns for end in ends if end.num_turns} == num_turns
    # A call that a cancelled rollout was in the middle of is refused, where it is not gone by then.
    assert {ends_of[each].num_rejected_calls for each in completed} == {0}
    assert {turn.dialect for turn in turns} == set(agent.dialects)
    assert {turn.streamed for turn in turns} == {agent.streamed}
    if agent.config:
        assert {ends_of[each].reward for each in trained} == {0.0, 1.0}, "all were graded alike"
    if agent.has_tools:
        assert max(num_turns.values()) > 1, "no rollout used the tool"

    forks = Counter(turn.fork for turn in turns if turn.fork not in (Fork.ROOT, Fork.NONE))
    assert not forks
    exactness = re.search(r"([\d.]+) % of (\d+) trained tokens sampled", output)
    assert exactness is not None, output
    assert exactness[1] == "100.00" and int(exactness[2]) > 0
    return {
        "dialect": ", ".join(sorted({turn.dialect for turn in turns})),
        "streamed": "yes" if agent.streamed else "no",
        "turns": f"{len(turns)} in {len(num_turns)} rollouts",
        "forks": "none",
        "exact": f"{exactness[1]} %",
    }


def start(agent: Agent, python: str | None, policies: Callable[[str], Path]) -> list[Any]:
    """The policy and the overrides of a run."""
    overrides = [
        "rollout.openai.sandbox.tier=namespaces",
        "rollout.max_head_offpolicyness=0",
        "total_train_steps=1",
        *([f"rollout.openai.agent_python={python}"] if python else []),
        *agent.overrides,
    ]
    if agent.config:
        return [
            policies("prose"),
            "experiment_name=e2e",
            "trial_name=run",
            "gconfig.max_new_tokens=200",
            "actor.dtype=float32",
            "actor.num_threads=1",
            "engine.num_threads=1",
            *overrides,
        ]
    return [
        policies("prose" if agent.script else "calculator"),
        f"workflow={agent.workflow}",
        f"rollout.openai.agent_env={HERE / agent.agent_env}",
        "rollout.timeout_s=60",
        "rollout.setup_timeout_s=300",
        "gconfig.max_new_tokens=48",
        *overrides,
    ]


def scripted(agent: Agent) -> dict[str, Any]:
    """How the run of an example, or with a scripted policy, is started."""
    how: dict[str, Any] = {}
    if agent.config:
        how |= {"config": CODING / agent.config, "cwd": REPO}
    if agent.script:
        variables = {"AREAL_SUB_SCRIPT": json.dumps(agent.script), "PYTHONPATH": f"{HERE}:{REPO}"}
        how |= {"program": (str(HERE / "scripted_train.py"),), "variables": variables}
    return how


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
    empty = dict.fromkeys(("version", "dialect", "streamed", "forks", "exact"), "")
    write_seen(agent, "subproc", turns=missing, **empty)
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


def write_seen(agent: Agent, mode: str, **seen: str) -> None:
    """For `write_agents.py`, where `tests/agents/run` wants one."""
    folder = os.environ.get("AREAL_SUB_SEEN")
    if folder:
        path = Path(folder) / f"{AGENTS.index(agent):03}-{mode}.json"
        path.write_text(json.dumps({"agent": agent.name, **seen}))
