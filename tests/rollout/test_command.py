"""Programs as agents: templates filled in, and what the end of a program is worth."""

from __future__ import annotations

import json
from typing import Any

import pytest

from areal_sub.errors import TaskError, WorkflowError
from areal_sub.records import Outcome
from areal_sub.rollout.command import (
    Command,
    declared_outputs,
    fill_command,
    fill_template,
    parse_command,
    program_end,
)

VARIABLES = {"base_url": "http://127.0.0.1:1/k/x/v1", "api_key": "x", "model": "default"}
DATA = {"question": "a b\n'c' $(d)", "n": 3, "deep": {"list": ["x", {"y": None}]}, "model": "T"}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{question}", "a b\n'c' $(d)"),
        ("--n={n}", "--n=3"),
        ("{deep}", '{"list": ["x", {"y": null}]}'),
        ("{task.deep.list.0}", "x"),
        ("{deep.list.1.y}", "null"),
        ("{model} {task.model}", "default T"),
        ("{{question}} {0} {} {a b} {", "{question} {0} {} {a b} {"),
        ('{"a":{"b":"{n}"}}', '{"a":{"b":"3"}}'),
        ("{{{n}}}", "{{n}}"),
        ('base_url = "{base_url}"', 'base_url = "http://127.0.0.1:1/k/x/v1"'),
    ],
)
def test_templates(template: str, expected: str) -> None:
    assert fill_template(template, DATA, VARIABLES) == expected


def test_the_whole_task_and_what_a_task_says_is_not_a_template() -> None:
    assert json.loads(fill_template("{task}", DATA, VARIABLES)) == DATA
    assert fill_template("{question}", {"question": "{api_key}"}, VARIABLES) == "{api_key}"


@pytest.mark.parametrize("name", ["questoin", "deep.x", "deep.list.2", "n.m", "task.api_key"])
def test_a_field_that_is_not_there(name: str) -> None:
    with pytest.raises(TaskError, match=r"no such field; its fields: question, n, deep, model"):
        fill_template(f"{{{name}}}", DATA, VARIABLES)


def test_every_part_is_filled_in() -> None:
    command = Command(
        argv=("node", "{n}"), stdin="{question}", files={"a/b": "{n}"}, env={"M": "{model}"}
    )
    filled = fill_command(command, DATA, VARIABLES)
    assert filled.argv == ["node", "3"]
    assert (filled.stdin, filled.files, filled.env) == (
        DATA["question"],
        {"a/b": "3"},
        {"M": "default"},
    )
    with pytest.raises(TaskError, match="NUL"):
        fill_command(Command(argv=("{q}",)), {"q": "\0"}, VARIABLES)


def test_a_line_is_split_as_a_shell_would_and_read_by_none() -> None:
    words = ("node", "a b.js", "{question}", "$HOME", ";")
    assert parse_command("cmd:node 'a b.js' {question} $HOME ';'").argv == words
    for line in ("cmd:", "cmd:  ", "cmd:node 'x"):
        with pytest.raises(WorkflowError):
            parse_command(line)


@pytest.mark.parametrize(
    ("stdout", "code", "outcome", "value"),
    [
        ("thinking\n0.5\n", 0, Outcome.COMPLETED, 0.5),
        ("1", 0, Outcome.COMPLETED, 1.0),
        ('x\n{"reward": 1, "why": "y"}\n\n', 0, Outcome.COMPLETED, 1.0),
        ('{"reward": {"chatcmpl-1": 0.5}}', 0, Outcome.COMPLETED, {"chatcmpl-1": 0.5}),
        ('{"reward": true}', 3, Outcome.COMPLETED, 1.0),
        ("0.5", 3, Outcome.EXITED, None),
        ("", 3, Outcome.EXITED, None),
        ('{"reward": "high"}', 3, Outcome.EXITED, None),
        ("", 0, Outcome.INVALID_RESULT, None),
        ("done", 0, Outcome.INVALID_RESULT, None),
        ("nan", 0, Outcome.INVALID_RESULT, None),
        ('{"reward": NaN}', 0, Outcome.INVALID_RESULT, None),
        ('{"reward": 1e999}', 0, Outcome.INVALID_RESULT, None),
        ('{"reward": [1]}', 0, Outcome.INVALID_RESULT, None),
        (f'{{"reward": {10**400}}}', 0, Outcome.INVALID_RESULT, None),
        ('{"score": 1}', 0, Outcome.INVALID_RESULT, None),
        ("[" * 100_000, 0, Outcome.INVALID_RESULT, None),
        ('{"reward":' + "[" * 100_000, 0, Outcome.INVALID_RESULT, None),
    ],
)
def test_the_last_line_is_the_reward(stdout: str, code: int, outcome: Outcome, value: Any) -> None:
    found = program_end("last_line", code, stdout, "first\nno such file: a.toml\n", {})
    assert found[:2] == (outcome, value)
    assert ("its last words: no such file: a.toml" in found[2]) == (outcome != "completed")
    assert len(found[2]) < 1000


@pytest.mark.parametrize(("code", "value"), [(0, 1.0), (1, 0.0), (3, 0.0), (127, None)])
def test_the_exit_code_is_the_reward(code: int, value: float | None) -> None:
    outcome, found, _ = program_end("exit_code", code, "whatever", "", {})
    assert (outcome, found) == (Outcome.EXITED if value is None else Outcome.COMPLETED, value)


@pytest.mark.parametrize(
    ("outputs", "code", "outcome", "value"),
    [
        ({"out/score": b"graded\n0.5\n"}, 0, Outcome.COMPLETED, 0.5),
        ({"out/score": b'{"reward": 1}'}, 2, Outcome.COMPLETED, 1.0),
        ({"out/score": b"0.5"}, 2, Outcome.EXITED, None),
        ({"out/score": b"\xff\xfe"}, 0, Outcome.INVALID_RESULT, None),
        ({}, 0, Outcome.INVALID_RESULT, None),
    ],
)
def test_a_file_holds_the_reward(
    outputs: dict[str, bytes], code: int, outcome: Outcome, value: float | None
) -> None:
    assert declared_outputs("file:out/score") == ["out/score"]
    found = program_end("file:out/score", code, "0.25", "", outputs)
    assert found[:2] == (outcome, value)
    assert ("not written" in found[2]) == (outputs == {})
