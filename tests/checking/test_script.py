"""What the scripted model says, and the tokenizer that it says it with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tokenizers import Tokenizer

from areal_sub.checking.script import ANSWER, example, next_answer
from areal_sub.checking.tokenizer import write_tokenizer
from areal_sub.proxy.render import Renderer  # noqa: F401  (what the folder has to satisfy)
from areal_sub.proxy.template import load_chat_template

USER = {"role": "user", "content": "hello <tool>no tool</tool>"}
CALLS = {"role": "assistant", "content": "", "tool_calls": []}
RESULT = {"role": "tool", "content": "1"}


def tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(made)
    return made


def prompt(folder: Path, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
    template = load_chat_template(folder)
    return template.render(messages, tools, add_generation_prompt=True)


def called(answer: str) -> list[tuple[str, Any]]:
    calls = [json.loads(line) for line in answer.split("\n") if line.startswith("{")]
    return [(call["name"], call["arguments"]) for call in calls]


def test_it_calls_one_tool_then_two_then_answers(folder: Path) -> None:
    tools = [tool("a"), tool("b")]
    said: list[dict[str, Any]] = [USER]
    assert called(next_answer(prompt(folder, said, tools))) == [("a", {"n": 1})]
    said += [CALLS, RESULT]
    assert called(next_answer(prompt(folder, said, tools))) == [("a", {"n": 1}), ("b", {"n": 1})]
    said += [CALLS, RESULT, RESULT]
    assert next_answer(prompt(folder, said, tools)) == ANSWER
    said += [{"role": "assistant", "content": ANSWER}, USER]
    assert called(next_answer(prompt(folder, said, tools))) == [("a", {"n": 1})], "a new question"
    assert next_answer(prompt(folder, [USER], [])) == ANSWER


def test_a_script_is_said_line_by_line_and_its_last_line_from_then_on(folder: Path) -> None:
    said: list[dict[str, Any]] = [USER]
    for line in ("one", "two", "two"):
        assert next_answer(prompt(folder, said, [tool("a")]), ["one", "two"]) == line
        said += [{"role": "assistant", "content": line}, USER]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"enum": [3, 4]}, "b": {"type": "null"}}},
        {"type": "array", "items": {"type": "number"}, "minItems": 3},
        {"anyOf": [{"type": "boolean"}, {"type": "string"}]},
        {"type": ["integer", "null"]},
        {"type": "object", "properties": {"deep": {"type": "object", "required": []}}},
        {"const": {"x": 1}},
        True,
    ],
)
def test_examples_fit_their_schema(schema: Any) -> None:
    jsonschema.validate(example(schema), schema)


def test_a_schema_without_end_has_an_example() -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {}, "required": ["again"]}
    schema["properties"]["again"] = schema
    assert json.dumps(example(schema)).count("again") > 1


def test_one_token_per_byte(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "hé 😀\n<tool_call>"
    ids = tokenizer.encode(text).ids
    assert len(ids) == len("hé 😀\n".encode()) + 1
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
