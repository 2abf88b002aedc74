"""From a configuration to agents: programs located, environments shared, tasks checked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from areal_sub.config import Config, parse_config
from areal_sub.errors import ConfigError, TaskError, WorkflowError
from areal_sub.trainer.agents import agent_text, agents_of, check_tasks
from areal_sub.trainer.datasets import Task

BASE = {"experiment_name": "e", "trial_name": "t", "actor": {"path": "m"}}


def configured(*overrides: str) -> Config:
    return parse_config(None, overrides, base=BASE)


def agents(*overrides: str, **options: Any) -> Any:
    return agents_of(configured(*overrides), say=lambda _: None, **options)


def test_one_agent(tmp_path: Path) -> None:
    trained, evaluated = agents("workflow=a.B", "workflow_kwargs.x=1")
    (agent,) = trained.agents
    assert (agent.target, agent.workflow_kwargs) == ("a.B", {"x": 1})
    assert (agent.python, agent.name) == ("", "")
    assert evaluated is trained
    _, evaluated = agents("workflow=a.B", "eval_workflow=a.C")
    assert evaluated.agents[0].target == "a.C"
    trained, _ = agents("workflow=a.B", workflow="given.In:Code", workflow_kwargs={"y": 2})
    assert trained.agents[0].target == "given.In:Code"
    assert trained.agents[0].workflow_kwargs == {"y": 2}
    with pytest.raises(ConfigError, match="no agent"):
        agents()


def test_several_share_an_environment_and_have_their_names(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-I", "-m", "venv", "--without-pip", venv], check=True)
    overrides = [
        f"rollout.openai.agents.a={{workflow: a.A, weight: 3, agent_env: {venv}}}",
        f"rollout.openai.agents.b={{command: {{argv: [python, -V]}}, agent_env: {venv}}}",
        "rollout.openai.agents.c={workflow: 'cmd:sh x'}",
    ]
    config = configured(*overrides, "seed=5")
    trained, _ = agents_of(config, say=lambda _: None)
    a, b, c = trained.agents
    assert [agent.name for agent in trained.agents] == ["a", "b", "c"]
    assert (trained.seed, a.weight, c.weight) == (5, 3.0, 1.0)
    assert a.python == str(venv / "bin" / "python")
    path = f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}"
    assert a.env["PATH"] == b.env["PATH"] == path
    assert str(venv) in b.readable, "a program of it needs its folder"
    assert (b.target, b.pickled, b.python) == ("", b"", "")
    own = str(Path(sys.executable).parent)
    assert c.env["PATH"].startswith(own), "without an environment, in ours"
    assert agent_text(config) == "a (60 %), b (20 %), c (20 %)"


def test_files_where_the_user_stands_are_found_by_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "agent.sh").write_text("#!/bin/sh\n")
    (tmp_path / "test").mkdir()
    trained, _ = agents("workflow=cmd:sh agent.sh test other.sh {question}")
    (agent,) = trained.agents
    assert agent.command is not None
    here = str(tmp_path / "agent.sh")
    assert agent.command.argv == ("sh", here, "test", "other.sh", "{question}")
    trained, _ = agents("workflow=cmd:./agent.sh")
    assert trained.agents[0].command.argv == (here,)


def test_a_program_that_is_not_there_is_told_at_once() -> None:
    with pytest.raises(WorkflowError, match="no program 'no-such-program' on the PATH"):
        agents("workflow=cmd:no-such-program {x}")


def test_a_program_of_the_users_own_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As nvm installs node: what is beside `bin` belongs to it; not so in `~/bin`."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder in ("home/.nvm/v20/bin", "home/bin"):
        program = tmp_path / folder / f"tool-{len(folder)}"
        program.parent.mkdir(parents=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    trained, _ = agents("workflow=cmd:tool-17")
    assert str(tmp_path / "home/.nvm/v20") in trained.agents[0].readable
    trained, _ = agents("workflow=cmd:tool-8")
    assert trained.agents[0].readable[-2:] == (str(tmp_path / "home/bin/tool-8"),) * 2
    trained, _ = agents(f"workflow=cmd:{tmp_path}/home/.nvm/v20/bin/tool-17")
    assert str(tmp_path / "home/.nvm/v20") in trained.agents[0].readable, "by its whole path, too"
    trained, _ = agents("workflow=cmd:/only/inside/tool")
    assert trained.agents[0].command.argv == ("/only/inside/tool",)


def test_every_task_has_what_a_program_is_given() -> None:
    trained, _ = agents("workflow=cmd:sh {question} {base_url}")
    tasks = [Task(task_id=str(n), data={"question": "?"}) for n in range(3)]
    check_tasks(trained, tasks, Path("/p"))
    tasks.append(Task(task_id="3", data={"text": "?"}))
    with pytest.raises(TaskError, match=r"\{question\}.*its fields: text"):
        check_tasks(trained, tasks, Path("/p"))
