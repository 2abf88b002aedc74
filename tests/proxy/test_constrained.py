"""Structured output and forced tool calls with the real SDK, proxy and engine, and a random model
that would never write such a thing by itself."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

USER = {"role": "user", "content": "Hello there"}
PARAMETERS = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 99},
        "op": {"type": "string", "enum": ["+", "-"]},
        "not a tag": {"const": '"</tool_call><|im_end|>'},
    },
    "required": ["a", "op", "not a tag"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": PARAMETERS}}
    for name in ("calc", "calculus")
]
NAMED = {"type": "function", "function": {"name": "calculus"}}


class Step(BaseModel):
    kind: Literal["add", "multiply"]
    by: int = Field(ge=0, le=9)


class Plan(BaseModel):
    steps: list[Step] = Field(min_length=1, max_length=2)
    sure: bool


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_response_format_is_kept_to(with_engine: Any, temperature: float) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open(max_new_tokens=500, temperature=temperature)
        async with rollout.client() as client:
            answers = await asyncio.gather(
                *(
                    client.beta.chat.completions.parse(
                        model="m", messages=[USER], response_format=Plan
                    )
                    for _ in range(4)
                )
            )
            anything = await client.chat.completions.create(
                model="m", messages=[USER], response_format={"type": "json_object"}, max_tokens=200
            )
        for answer in answers:
            assert answer.choices[0].finish_reason == "stop"
            assert isinstance(answer.choices[0].message.parsed, Plan)
        assert anything.choices[0].message.content.startswith("{")
        turns = rollout.turns()
        assert all(turn.constrained for turn in turns)
        # A random model's own logprobs, not those of what the grammar left.
        assert all(turn.rollout_logprobs.min() < -1 for turn in turns)

    with_engine(work)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_forced_call_is_a_call(with_engine: Any, choice: Any, stream: bool) -> None:
    asked = {"model": "m", "messages": [USER], "tools": TOOLS, "tool_choice": choice}

    async def one(client: openai.AsyncOpenAI, **fields: Any) -> Any:
        if not stream:
            answer = await client.chat.completions.create(**asked, **fields)
            return answer.choices[0]
        async with client.chat.completions.stream(**asked, **fields) as events:
            return (await events.get_final_completion()).choices[0]

    async def work(proxy: Any) -> None:
        rollout = await proxy.open(max_new_tokens=300)
        # With parallel calls a random model may go on until it is cut, in mid-call; the SDK's
        # stream takes that for an error.
        cases = (False, False) if stream else (False, True)
        async with rollout.client() as client:
            choices = await asyncio.gather(
                *(one(client, parallel_tool_calls=parallel) for parallel in cases)
            )
        for parallel, given in zip(cases, choices, strict=True):
            calls = given.message.tool_calls
            if not parallel:
                assert (given.finish_reason, len(calls), given.message.content or None) == (
                    "tool_calls",
                    1,
                    None,
                )
            for call in calls:
                names = ["calculus"] if choice is NAMED else ["calc", "calculus"]
                assert call.function.name in names
                jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
            assert calls

    with_engine(work)


def test_every_dialect_forces_calls(with_engine: Any) -> None:
    message: Any = {"role": "user", "content": "Hello there"}

    async def work(proxy: Any) -> None:
        rollout = await proxy.open(max_new_tokens=300)
        async with rollout.client() as client:
            response = await client.responses.create(
                model="m",
                input="Hello there",
                tools=[{"type": "function", "strict": True, **TOOLS[0]["function"]}],
                tool_choice="required",
                parallel_tool_calls=False,
            )
        async with rollout.anthropic() as client:
            answer = await client.messages.create(
                model="m",
                max_tokens=300,
                messages=[message],
                tools=[{"name": "calc", "input_schema": PARAMETERS}],
                tool_choice={"type": "tool", "name": "calc", "disable_parallel_tool_use": True},
            )
        (item,) = response.output
        assert (item.type, item.name) == ("function_call", "calc")
        jsonschema.validate(json.loads(item.arguments), PARAMETERS)
        (block,) = answer.content
        assert (block.type, block.name, answer.stop_reason) == ("tool_use", "calc", "tool_use")
        jsonschema.validate(block.input, PARAMETERS)

    with_engine(work)


def test_every_dialect_gives_json(with_engine: Any) -> None:
    schema = Plan.model_json_schema()

    async def work(proxy: Any) -> None:
        rollout = await proxy.open(max_new_tokens=500)
        async with rollout.client() as client:
            response = await client.responses.parse(model="m", input="Hello", text_format=Plan)
        async with rollout.anthropic() as client:
            strict = {"additionalProperties": False, **schema}
            answer = await client.messages.create(
                model="m",
                max_tokens=500,
                messages=[{"role": "user", "content": "Hello there"}],
                output_config={"format": {"type": "json_schema", "schema": strict}},
            )
        gemini = await rollout.gemini().models.generate_content(
            model="m",
            contents="Hello there",
            config={"response_mime_type": "application/json", "response_schema": Plan},
        )
        assert isinstance(response.output_parsed, Plan)
        Plan.model_validate_json(answer.content[0].text)
        assert isinstance(gemini.parsed, Plan)
        assert all(turn.constrained for turn in rollout.turns())

    with_engine(work)


def test_beside_it_all_is_as_without(with_engine: Any) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open(temperature=0.0, max_new_tokens=60)
        async with rollout.client() as client:

            async def free() -> str:
                answer = await client.chat.completions.create(model="m", messages=[USER])
                return str(answer.choices[0].message.content)

            alone = await free()
            asked = {"messages": [USER], "tools": TOOLS, "tool_choice": "required", "n": 3}
            together = await asyncio.gather(
                client.chat.completions.create(model="m", **asked), free(), free()
            )
        assert together[1:] == [alone, alone]
        assert sorted(turn.constrained for turn in rollout.turns()) == [False] * 3 + [True] * 3

    with_engine(work)


def chain(length: int) -> dict[str, Any]:
    links = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(length)}
    return {"$defs": {**links, f"d{length}": {"type": "null"}}, "$ref": "#/$defs/d0"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"not": {}}, "Unimplemented keys"),
        ({"type": "string", "pattern": "(?=a)"}, "look-around"),
        (chain(5000), "more CPU time, memory or stack"),
    ],
)
def test_a_schema_that_cannot_be_kept_to_is_a_bad_request(
    with_engine: Any, schema: Any, says: str, stream: bool
) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}

    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        async with rollout.client(max_retries=2) as client:
            with pytest.raises(openai.BadRequestError, match=says) as caught:
                await client.chat.completions.create(
                    model="m", messages=[USER], response_format=form, stream=stream
                )
        assert caught.value.param == "response_format"
        assert (await proxy.stats())["num_rejected"] == {"invalid_request": 1}
        assert rollout.turns() == []

    with_engine(work)
