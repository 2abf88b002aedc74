"""From the configuration to the agents of a run, with their environments found or built.

Called by `trainer` and `chat`, before any process of a run is started.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from areal_sub.config import Config
from areal_sub.config.schema import AgentConfig, CommandConfig, is_program
from areal_sub.errors import ConfigError, WorkflowError
from areal_sub.rollout.command import Command, fill_command, parse_command
from areal_sub.rollout.environ import agent_environment, template_variables
from areal_sub.rollout.environments import (
    Environment,
    cache_folder,
    own_environment,
    prepare,
)
from areal_sub.rollout.mix import Agent, AgentMix
from areal_sub.trainer.datasets import Task
from areal_sub.workflow.resolve import describe_target

Say = Callable[[str], None]

_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/nix/store")


def agents_of(
    config: Config,
    workflow: Any = None,
    eval_workflow: Any = None,
    workflow_kwargs: dict[str, Any] | None = None,
    *,
    say: Say,
) -> tuple[AgentMix, AgentMix]:
    """(those to train, those to evaluate). `workflow` and the like: given in code, they win.

    Raises `ConfigError` where there is no agent, `WorkflowError` where one cannot be used.
    """
    openai = config.rollout.openai
    environments: dict[tuple[str | None, str | None], Environment] = {}

    def environment(agent_env: str | None, agent_python: str | None) -> Environment:
        wanted = (agent_env, agent_python)
        if wanted not in environments:
            environments[wanted] = prepare(
                agent_env,
                agent_python,
                cache=cache_folder(os.environ),
                timeout_s=openai.agent_env_timeout_s,
                say=say,
            )
        return environments[wanted]

    kwargs = config.workflow_kwargs if workflow_kwargs is None else workflow_kwargs

    def single(agent: Any) -> Agent:
        return _agent(agent, kwargs, environment(openai.agent_env, openai.agent_python), config)

    def mix(*agents: Agent) -> AgentMix:
        return AgentMix(agents, seed=config.seed)

    if (workflow := workflow or config.workflow) is not None:
        trained = mix(single(workflow))
    elif openai.command is not None:
        own = environment(openai.agent_env, openai.agent_python)
        trained = mix(_program(_command(openai.command), own))
    elif openai.agents:
        trained = mix(*(_named(n, a, environment, config) for n, a in openai.agents.items()))
    else:
        raise ConfigError(
            "no agent: set workflow=package.module.Name, or rollout.openai.command or .agents, or "
            "pass workflow=... to train()"
        )
    evaluated = eval_workflow or config.eval_workflow
    return trained, trained if evaluated is None else mix(single(evaluated))


def has_agent(config: Config) -> bool:
    openai = config.rollout.openai
    return bool(config.workflow or openai.command or openai.agents)


def agent_text(config: Config) -> str:
    """What the agents are, as a line for the user."""
    openai = config.rollout.openai
    if openai.agents:
        total = sum(agent.weight for agent in openai.agents.values())
        shares = [f"{n} ({100 * a.weight / total:.0f} %)" for n, a in openai.agents.items()]
        return ", ".join(shares)
    if openai.command is not None:
        return "the program " + " ".join(openai.command.argv)
    return config.workflow or "(given in code)"


def check_tasks(mix: AgentMix, tasks: list[Task], project: Path) -> None:
    """Raises `TaskError` where a task lacks a field that a program is to be given."""
    variables = template_variables(agent_environment(port=1, key="key", extra={}), str(project))
    for agent in mix.agents:
        if agent.command is not None:
            for task in tasks:
                fill_command(agent.command, task.data, variables)


def _named(
    name: str,
    agent: AgentConfig,
    environment: Callable[[str | None, str | None], Environment],
    config: Config,
) -> Agent:
    own = environment(agent.agent_env, agent.agent_python)
    if agent.command is not None:
        made = _program(_command(agent.command), own)
    else:
        made = _agent(agent.workflow, agent.workflow_kwargs, own, config)
    return replace(made, name=name, weight=agent.weight)


def _agent(
    agent: Any, workflow_kwargs: dict[str, Any], environment: Environment, config: Config
) -> Agent:
    if isinstance(agent, str) and is_program(agent):
        return _program(parse_command(agent), environment)
    target, pickled = describe_target(agent)
    if config.rollout.openai.mode == "inline" and pickled:
        raise WorkflowError("an agent without an import path needs rollout.openai.mode=subproc")
    return Agent(
        target=target,
        pickled=pickled,
        workflow_kwargs=workflow_kwargs,
        python=environment.python,
        readable=environment.readable,
        env=_variables(environment),
    )


def _program(command: Command, environment: Environment) -> Agent:
    """Raises `WorkflowError` where there is no such program."""
    if environment == Environment():
        environment = own_environment()
    first, *words = command.argv
    readable: tuple[str, ...] = ()
    if "{" not in first and ("/" not in first or Path(first).is_absolute()):
        found = shutil.which(first, path=_search_path(environment))
        if found is not None:
            readable = _home_of(Path(found))
        elif "/" not in first:
            raise WorkflowError(f"there is no program {first!r} on the PATH of the agent")
    argv = (first if readable else _located(first), *map(_located, words))
    return Agent(
        command=replace(command, argv=argv),
        readable=(*environment.readable, *readable),
        env=_variables(environment),
    )


def _command(config: CommandConfig) -> Command:
    return Command(
        argv=tuple(config.argv),
        stdin=config.stdin,
        files=config.files,
        env=config.env,
        reward=config.reward,
    )


def _located(word: str) -> str:
    """A program starts in an empty folder: a file here is told by its whole path."""
    path = Path(word)
    is_here = word and "{" not in word and not path.is_absolute() and path.is_file()
    return str(path.resolve()) if is_here else word


def _home_of(program: Path) -> tuple[str, ...]:
    """What has to be readable for a program that was not installed with the system's."""
    real = program.resolve()
    if str(real).startswith(tuple(f"{folder}/" for folder in _SYSTEM)):
        return (str(program),)
    # `~/.nvm/versions/node/v22/bin/node` needs what is beside its bin; `~/bin/tool` stands alone.
    prefix = real.parent.parent
    whole = real.parent.name == "bin" and not Path.home().resolve().is_relative_to(prefix)
    return (str(program), str(real), *((str(prefix),) if whole else ()))


def _search_path(environment: Environment) -> str:
    return os.pathsep.join([*environment.programs, os.environ.get("PATH", os.defpath)])


def _variables(environment: Environment) -> Mapping[str, str]:
    if not environment.programs:
        return environment.env
    return {**environment.env, "PATH": _search_path(environment)}
