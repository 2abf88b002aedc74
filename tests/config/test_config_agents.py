"""Several agents, programs and environments in a configuration: as sections with names of their
own, checked like every other section."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from areal_sub.config import dump_config, parse_config
from areal_sub.errors import ConfigError

Write = Callable[..., Path]

MIX = """\
rollout:
  openai:
    agents:
      calc:
        workflow: calc.Agent
        workflow_kwargs: {style: terse}
        weight: 3
      other:
        agent_env: envs/2026
        command:
          argv: [node, agent.js, "{question}"]
          files: {~/.config/a.toml: 'url = "{base_url}"'}
          reward: exit_code
"""


def complaint(file: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(file, overrides)
    return str(caught.value)


def test_agents_by_name(write: Write, tmp_path: Path) -> None:
    override = ["rollout.openai.agents.calc.weight=2", "rollout.openai.agents.third.workflow=t.T"]
    config = parse_config(write(MIX), override)
    agents = config.rollout.openai.agents
    assert {name: agent.weight for name, agent in agents.items()} == {
        "calc": 2.0,
        "other": 1.0,
        "third": 1.0,
    }
    assert agents["calc"].workflow_kwargs == {"style": "terse"}
    command = agents["other"].command
    assert command is not None and command.argv == ["node", "agent.js", "{question}"]
    assert command.files == {"~/.config/a.toml": 'url = "{base_url}"'}
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_config(config))
    assert parse_config(dumped, []) == config


def test_text_is_taken_as_text_in_there(write: Write) -> None:
    config = parse_config(
        write("rollout: {openai: {agents: {a: {workflow: a.B, agent_env: 2026}}}}\n"),
        ["rollout.openai.agents.a.agent_python=3.12"],
    )
    agent = config.rollout.openai.agents["a"]
    assert (agent.agent_env, agent.agent_python) == ("2026", "3.12")


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ["rollout.openai.agents.calc.wieght=2"],
            "there is no key 'wieght' in rollout.openai.agents.calc; did you mean weight?",
        ),
        (
            ["rollout.openai.agents={calc: {wieght: 2, workflow: a.B}}"],
            "there is no key 'wieght' in rollout.openai.agents.calc; did you mean weight?",
        ),
        (
            ["rollout.openai.agents.other.command.args=[a]"],
            "there is no key 'args' in rollout.openai.agents.other.command; did you mean argv?",
        ),
        (["rollout.openai.agents.calc.weight=0"], "expected a number > 0; got 0"),
        (["rollout.openai.agents.calc.weight=much"], "expected a number > 0; got 'much'"),
        (["rollout.openai.agents.other.command.argv=x"], "expected a list (text each); got 'x'"),
        (["rollout.openai.agents.other.command.argv=[]"], "write a program and its words"),
        (["rollout.openai.agents.other.command.reward=x"], "none of last_line, exit_code, file:"),
        (["rollout.openai.agents.other.command.reward=file:/a"], "not the path of one file"),
        (["rollout.openai.agents.other.command.reward=file:a/*"], "not the path of one file"),
        (["rollout.openai.agents.calc.command={argv: [a]}"], "set either workflow or command"),
        (["rollout.openai.agents.calc.workflow="], "set either workflow or command"),
        (["rollout.openai.agents.calc.workflow=cmd:x"], "workflow_kwargs are for Python agents"),
        (["rollout.openai.agents={a b: {workflow: x.Y}}"], "write up to 64 letters, digits"),
        (["workflow=a.B"], "set either workflow or rollout.openai.agents"),
        (["rollout.openai.command={argv: [a]}"], "set either command or agents"),
        (["rollout.openai.mode=inline"], "agents with a command needs mode=subproc"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(
    write: Write, overrides: Sequence[str], text: str
) -> None:
    assert text in complaint(write(MIX), *overrides)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["workflow=cmd:node x"], "workflow=cmd:node x: a program needs rollout.openai.mode"),
        (["eval_workflow=cmd:node x"], "eval_workflow=cmd:node x: a program needs"),
        (["rollout.openai.command.argv=[a]"], "command needs mode=subproc"),
        (["rollout.openai.agent_env=venv"], "agent_env needs mode=subproc"),
        (["rollout.openai.agents.a.workflow=cmd:x"], "agents with cmd: needs mode=subproc"),
        (
            ["rollout.openai.agents={a: {workflow: a.B, agent_env: venv}}"],
            "agents with an agent_env needs mode=subproc",
        ),
    ],
)
def test_inline_is_this_very_process(write: Write, overrides: Sequence[str], text: str) -> None:
    assert text in complaint(write(), "rollout.openai.mode=inline", *overrides)


@pytest.mark.parametrize("path", ["/etc/passwd", "../up", "a/../../b", "~/../b", ""])
def test_files_stay_with_the_child(write: Write, path: str) -> None:
    override = f"rollout.openai.command={{argv: [a], files: {{'{path}': x}}}}"
    assert "neither below the working directory nor ~/path" in complaint(write(), override)


def test_a_program_in_one_line(write: Write) -> None:
    config = parse_config(write(), ["workflow=cmd:node agent.js {question}"])
    assert config.workflow == "cmd:node agent.js {question}"
    assert "workflow_kwargs are for Python agents" in complaint(
        write(), "workflow=cmd:node", "workflow_kwargs.a=1"
    )
