"""Agents that are programs: from templates to what is executed, and from its end to a reward. Pure.

A template is text with `{name}`s. `{base_url}`, `{api_key}` and the like are the rollout's own;
`{question}` is that field of the task, `{task.a.b}` one deeper in it (or one of a name that is
taken); `{{name}}` is a plain `{name}`. All other braces stay as they are, so JSON and TOML can be
templates. No shell ever sees the words.

Made by the trainer from `rollout.openai.command` or `workflow=cmd:...`; filled in for each rollout
by `attempt`; `program_end` is called by the supervisor.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from areal_sub.errors import TaskError, WorkflowError
from areal_sub.records import Outcome
from areal_sub.rollout.rewards import judge_result

PREFIX = "cmd:"
FILE = "file:"
_NOT_EXECUTED = (126, 127)
_FIELD = re.compile(r"\{\{([A-Za-z_][\w.]*)\}\}|\{([A-Za-z_][\w.]*)\}")
_MAX_LAST_WORDS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Templates of one program's rollouts."""

    argv: tuple[str, ...]
    stdin: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    """Path below the working directory, or `~/path`, to content."""
    env: Mapping[str, str] = field(default_factory=dict)
    reward: str = "last_line"


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """A command with nothing left to fill in."""

    argv: list[str]
    stdin: str
    files: dict[str, str]
    env: dict[str, str]


def parse_command(workflow: str) -> Command:
    """`cmd:node agent.js {question}`, split as a shell would. Raises `WorkflowError`."""
    try:
        argv = shlex.split(workflow.removeprefix(PREFIX))
    except ValueError as error:
        raise WorkflowError(f"workflow={workflow}: {error}") from None
    if not argv:
        raise WorkflowError(f"workflow={workflow} names no program: write cmd:program word ...")
    return Command(argv=tuple(argv))


def fill_command(command: Command, data: Mapping[str, Any], variables: Mapping[str, str]) -> Filled:
    """`command` for the task `data`. Raises `TaskError` naming the field that the task lacks."""

    def fill(template: str) -> str:
        return fill_template(template, data, variables)

    argv = [fill(word) for word in command.argv]
    for word in argv:
        if "\0" in word:
            raise TaskError(f"the task puts a NUL into the word {word[:100]!r} of the command")
    return Filled(
        argv=argv,
        stdin=fill(command.stdin),
        files={path: fill(content) for path, content in command.files.items()},
        env={name: fill(value) for name, value in command.env.items()},
    )


def fill_template(template: str, data: Mapping[str, Any], variables: Mapping[str, str]) -> str:
    """`template` with every `{name}` replaced. Text stays as it is, other values become JSON."""

    def value(match: re.Match[str]) -> str:
        literal, name = match.groups()
        if literal is not None:
            return f"{{{literal}}}"
        if name in variables:
            return variables[name]
        found = json_text(data) if name == "task" else _field(name, data, variables)
        return found if isinstance(found, str) else json_text(found)

    return _FIELD.sub(value, template)


def _field(name: str, data: Mapping[str, Any], variables: Mapping[str, str]) -> Any:
    found: Any = data
    for part in name.removeprefix("task.").split("."):
        if isinstance(found, Mapping) and part in found:
            found = found[part]
        elif isinstance(found, list) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        else:
            raise TaskError(
                f"the command has {{{name}}}, and the task has no such field; its fields: "
                f"{', '.join(map(str, data)) or 'none'}; and there are: {', '.join(variables)}, "
                "task (write {{" + name + "}} for plain braces)"
            )
    return found


def json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def declared_outputs(rule: str) -> list[str]:
    """What has to come out of the child for the reward to be found."""
    return [rule.removeprefix(FILE)] if rule.startswith(FILE) else []


def program_end(
    rule: str, exit_code: int, stdout: str, stderr: str, outputs: Mapping[str, bytes]
) -> tuple[Outcome, float | dict[str, float] | None, str]:
    """(outcome, result, error) of a program that ended by itself.

    `stdout`, `stderr`: their ends; `outputs`: path → content. `last_line`: the last line of stdout
    is a number, or an object with "reward": a number, or numbers by completion id; `file:PATH`: the
    last line of that output. A program that failed has no reward, unless that line is such an
    object. `exit_code`: 0 is the reward 1, other codes are 0.
    """
    if rule == "exit_code" and exit_code not in _NOT_EXECUTED:
        return Outcome.COMPLETED, float(exit_code == 0), ""
    where, said = "on stdout", stdout
    for path in declared_outputs(rule):
        where, said = f"of {path}", outputs.get(path, b"").decode("utf-8", "replace")
        if path not in outputs:
            where += " (which was not written, or is no file)"
    last = _last_line(said)
    words = f"; its last words: {_shown(_last_line(stderr))}" if stderr.strip() else ""
    if rule != "exit_code" and (exit_code == 0 or last.startswith("{")):
        try:
            reward, turn_rewards = judge_result(_reward_in(last, where))
        except WorkflowError as invalid:
            if exit_code == 0:
                return Outcome.INVALID_RESULT, None, f"{invalid}{words}"
        else:
            return Outcome.COMPLETED, turn_rewards if reward is None else reward, ""
    return Outcome.EXITED, None, f"exited with code {exit_code}{words}"


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2].strip()


def _shown(line: str) -> str:
    return line if len(line) <= _MAX_LAST_WORDS else f"...{line[-_MAX_LAST_WORDS:]}"


def _reward_in(line: str, where: str) -> Any:
    """What the last line says, not judged yet. Raises `WorkflowError` where it says nothing."""
    try:
        if not line.startswith("{"):
            return float(line)
        message = json.loads(line)
        return message["reward"]
    except (ValueError, RecursionError, KeyError):
        raise WorkflowError(
            f'the last line {where} is no reward (a number, or an object with "reward" in JSON): '
            f"{_shown(line)!r}"
        ) from None
