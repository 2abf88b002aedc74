"""Requests that are almost right: refused by name or read, never a failure of ours."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from areal_sub.proxy.dialects import Asked, chat, completions, gemini, messages, responses
from areal_sub.proxy.history import Keys
from areal_sub.proxy.kept import Kept, KeptAnswers
from areal_sub.proxy.neutral import Choice, Message, Thought, ToolCall, Usage
from areal_sub.proxy.refusals import Refusal

FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
TEXT = [{"type": "text", "text": "a"}]
BODIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "chat": (
        chat,
        {
            "model": "m",
            "messages": [
                {"role": "system", "content": TEXT, "name": "n"},
                {
                    "role": "assistant",
                    "content": None,
                    "reasoning_content": "r",
                    "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}],
                },
                {"role": "tool", "tool_call_id": "c", "content": "x"},
            ],
            "tools": [{"type": "function", "function": FUNCTION}],
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"function": {"name": "f"}}]},
            },
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}},
            "stop": ["a"],
            "n": 2,
            "top_p": 0.5,
            "stream_options": {"include_usage": True},
        },
    ),
    "completions": (completions, {"prompt": [[1, 2]], "stop": "a", "logprobs": 0, "best_of": 1}),
    "responses": (
        responses,
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
                {"type": "reasoning", "encrypted_content": "areal-sub:aGk=", "summary": []},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "x"},
                {"type": "custom_tool_call", "call_id": "c", "name": "g", "input": "x"},
                {
                    "type": "local_shell_call",
                    "call_id": "c",
                    "action": {"command": ["a"], "timeout_ms": 1},
                },
                {"type": "item_reference", "id": "msg_1_0"},
            ],
            "instructions": "i",
            "previous_response_id": "resp_1",
            "tools": [
                {"type": "function", **FUNCTION},
                {
                    "type": "custom",
                    "name": "g",
                    "format": {"type": "grammar", "syntax": "lark", "definition": "x"},
                },
                {"type": "local_shell"},
                {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "h"}]},
            ],
            "tool_choice": {"type": "function", "name": "f"},
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {}}},
            "include": ["reasoning.encrypted_content"],
            "metadata": {"a": "b"},
        },
    ),
    "messages": (
        messages,
        {
            "system": TEXT,
            "messages": [
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "t", "signature": "s"},
                        *TEXT,
                        {"type": "tool_use", "id": "c", "name": "f", "input": {}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "c", "content": TEXT},
                        *TEXT,
                    ],
                },
            ],
            "tools": [{"name": "f", "input_schema": {}}],
            "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
            "output_config": {"format": {"type": "json_schema", "schema": {}}},
            "stop_sequences": ["x"],
            "context_management": {"edits": []},
        },
    ),
    "gemini": (
        gemini,
        {
            "systemInstruction": {"parts": [{"text": "a"}]},
            "contents": [
                {
                    "role": "model",
                    "parts": [
                        {"text": "a", "thought": True},
                        {"functionCall": {"name": "f", "args": {}}},
                    ],
                },
                {"parts": [{"functionResponse": {"name": "f", "response": {"output": 1}}}]},
            ],
            "tools": [
                {
                    "functionDeclarations": [
                        {
                            "name": "f",
                            "parameters": {
                                "type": "OBJECT",
                                "properties": {"a": {"type": "ARRAY", "items": {"anyOf": [{}]}}},
                            },
                        }
                    ]
                }
            ],
            "toolConfig": {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["f"]}},
            "generationConfig": {
                "stopSequences": ["x"],
                "topK": 1.0,
                "responseModalities": ["TEXT"],
                "responseSchema": {"type": "OBJECT"},
            },
        },
    ),
}

WRONG = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=4),
    st.sampled_from(["auto", "none", "any", "required", "text", "function", "message", "user"]),
    st.lists(st.one_of(st.none(), st.text(max_size=2), st.just({}), st.just([])), max_size=2),
    st.dictionaries(
        st.sampled_from(["type", "name", "text", "content", "role", "id"]),
        st.one_of(st.text(max_size=3), st.integers(), st.just([]), st.none()),
        max_size=2,
    ),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    found = [path] if path else []
    for key, child in children:
        found += places(child, (*path, key))
    return found


def asked_for(body: Any) -> Asked:
    kept = KeptAnswers()
    output = b'{"output": [{"id": "msg_1_0", "type": "message", "role": "assistant"}]}'
    kept.add("resp_1", Kept((Message("user", "a"),), output, 1))
    return Asked(json.dumps(body).encode(), {"target": "m:generateContent"}, {"alt": "sse"}, kept)


@pytest.mark.parametrize("name", list(BODIES))
def test_these_are_right(name: str) -> None:
    dialect, body = BODIES[name]
    dialect.parse(asked_for(body))


@pytest.mark.parametrize("name", list(BODIES))
@settings(max_examples=120)
@given(data=st.data())
def test_almost_right_requests(name: str, data: st.DataObject) -> None:
    dialect, body = BODIES[name]
    body = copy.deepcopy(body)
    for path in data.draw(st.lists(st.sampled_from(places(body)), max_size=3)):
        parent = body
        try:
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = data.draw(WRONG)
        except (KeyError, IndexError, TypeError):
            continue  # gone by an earlier change
    try:
        call = dialect.parse(asked_for(body))
    except Refusal as refusal:
        assert refusal.status == 400
        assert json.loads(dialect.error_body(refusal))["error"]["message"]
        return
    Keys.of(call.messages, call.tools)
    choice = Choice(finish_reason="tool_calls")
    for part in (Thought("t"), "a", ToolCall("c", "f", "{}"), ToolCall("d", "g", "[1]"), "b"):
        choice.append(part)
    choices = [choice] * call.num_choices
    assert json.loads(dialect.answer("id_1", call, choices, Usage(1, 2)))
    stream = dialect.stream("id_1", call, 1)
    for index, each in enumerate(choices):
        assert b"".join(stream.events(index, each))
    assert stream.end(Usage(1, 2))


def test_a_seal_that_cannot_be_one_is_anothers() -> None:
    sealed = {"type": "reasoning", "encrypted_content": "areal-sub:\u00e9", "summary": []}
    call = responses.parse(asked_for({"input": [sealed, {"role": "user", "content": "a"}]}))
    assert [message.reasoning for message in call.messages] == ["", ""]
