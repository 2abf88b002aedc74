"""The Responses API through the real OpenAI SDK, over real sockets."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from areal_sub.proxy.dialects import Asked, responses
from areal_sub.proxy.refusals import Refusal
from areal_sub.records import Fork

CALC: Any = {"type": "function", "name": "calc", "parameters": {"type": "object"}, "strict": True}
CALL = '<tool_call>\n{"name": "calc", "arguments": {"a": 7, "b": 8}}\n</tool_call>'


def items_of(response: Any) -> list[Any]:
    """What agents send back: items as the SDK dumps them, nulls and all."""
    return [item.model_dump() for item in response.output]


async def ask(client: openai.AsyncOpenAI, stream: bool, **asked: Any) -> Any:
    if not stream:
        return await client.responses.create(model="gpt-5", **asked)
    async with client.responses.stream(model="gpt-5", **asked) as events:
        numbers = [event.sequence_number async for event in events]
        assert numbers == list(range(len(numbers)))
        return await events.get_final_response()


@pytest.mark.parametrize("stream", [False, True])
def test_one_turn(proxied: Any, stream: bool) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says("56<|im_end|>")
        rollout = await proxy.open()
        async with rollout.client() as client:
            response = await ask(client, stream, instructions="Be brief.", input="7*8?", user=None)
        assert response.id.startswith("resp_")
        assert response.output_text == "56"
        assert (response.status, response.model, response.error) == ("completed", "gpt-5", None)
        assert response.instructions == "Be brief."
        [request], [sampled] = proxy.engine.requests, proxy.engine.sampled
        assert response.usage.input_tokens == len(request.prompt_token_ids)
        assert response.usage.output_tokens == len(sampled)
        [turn] = rollout.turns()
        assert (turn.turn_id, turn.dialect, turn.model) == (response.id, "responses", "gpt-5")
        assert proxy.engine.vocabulary.decode(request.prompt_token_ids) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n7*8?<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        await rollout.end(reward=None, turn_rewards={response.id: 0.5})
        assert proxy.records()[-1].turn_rewards == {response.id: 0.5}

    proxied(work)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("way", ["items", "sealed", "previous", "references"])
def test_tool_turns_are_token_exact_whatever_way_the_agent_goes_on(
    proxied: Any, stream: bool, way: str
) -> None:
    async def work(proxy: Any) -> None:
        thought = "<think>\nhm\n</think>\n\n"
        proxy.engine.says(
            f"{thought}I compute.\n{CALL}\n{CALL}\nSo<|im_end|>",
            f"{thought}56.<|im_end|>",
            "ok<|im_end|>",
        )
        rollout = await proxy.open()
        asked: dict[str, Any] = {
            "tools": [CALC],
            "store": way in ("previous", "references"),
            "include": ["reasoning.encrypted_content"],
        }

        def go_on(history: list[Any], response: Any, *new: Any) -> dict[str, Any]:
            items = items_of(response)
            if way == "previous":
                return {"input": [*new], "previous_response_id": response.id}
            if way == "references":
                items = [{"type": "item_reference", "id": item["id"]} for item in items]
            if way == "sealed":  # as codex
                items = [{k: v for k, v in item.items() if k != "id"} for item in items]
                items[0]["content"] = None
            history += [*items, *new]
            return {"input": history}

        history: list[Any] = [{"role": "user", "content": "7*8?"}]
        async with rollout.client() as client:
            first = await ask(client, stream, input=history, **asked)
            kinds = ["reasoning", "message", "function_call", "function_call", "message"]
            assert [item.type for item in first.output] == kinds
            assert first.output[0].content[0].text == "hm"
            assert first.output_text == "I compute.So"
            results = [
                {"type": "function_call_output", "call_id": item.call_id, "output": "56"}
                for item in first.output
                if item.type == "function_call"
            ]
            assert json.loads(first.output[2].arguments) == {"a": 7, "b": 8}
            second = await ask(client, stream, **go_on(history, first, *results), **asked)
            assert second.output_text == "56."
            sure = {
                "type": "message",
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "Su"},
                    {"type": "input_text", "text": "re?"},
                ],
            }
            await ask(client, stream, **go_on(history, second, sure), **asked)
        one, two, three = rollout.turns()
        assert [turn.fork for turn in (one, two, three)] == [Fork.ROOT, Fork.NONE, Fork.NONE]
        assert (two.parent_turn_id, three.parent_turn_id) == (one.turn_id, two.turn_id)
        await rollout.end()
        prompt = proxy.engine.requests[2].prompt_token_ids.tolist()
        sequence = rollout.trajectory().sequence(three.turn_id).tolist()
        assert sequence == prompt + proxy.engine.sampled[2]
        decode = proxy.engine.vocabulary.decode
        assert decode(three.context_token_ids) == (
            "\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
        )

    proxied(work, reasoning_parser="think")


def test_chat_goes_on_where_responses_left_off(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says(f"{CALL}<|im_end|>", "56<|im_end|>")
        rollout = await proxy.open()
        function = {"name": "calc", "parameters": {"type": "object"}, "strict": False}
        async with rollout.client() as client:
            first = await ask(client, False, input="7*8?", tools=[CALC])
            [called] = first.output
            call = {"name": "calc", "arguments": called.arguments}
            messages: Any = [
                {"role": "user", "content": "7*8?"},
                {"role": "assistant", "tool_calls": [{"id": called.call_id, "function": call}]},
                {"role": "tool", "tool_call_id": called.call_id, "name": "calc", "content": "56"},
            ]
            await client.chat.completions.create(
                model="m", messages=messages, tools=[{"type": "function", "function": function}]
            )
        assert [turn.fork for turn in rollout.turns()] == [Fork.ROOT, Fork.NONE]

    proxied(work)


def test_the_events_in_their_order(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says(f"<think>hm</think>a{CALL}<|im_end|>")
        rollout = await proxy.open()
        async with rollout.client() as client:
            stream = await client.responses.create(
                model="m", input="?", tools=[CALC], stream=True, store=False
            )
            kinds = [event.type async for event in stream]
        collapsed = [kind for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]
        assert collapsed == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.reasoning_text.delta",
            "response.reasoning_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.output_item.added",
            "response.function_call_arguments.delta",
            "response.function_call_arguments.done",
            "response.output_item.done",
            "response.completed",
        ]

    proxied(work, reasoning_parser="think")


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_was_cut_is_incomplete(proxied: Any, stream: bool) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says("abcdef<|im_end|>", "ok<|im_end|>")
        rollout = await proxy.open()
        async with rollout.client() as client:
            if stream:
                events = await client.responses.create(
                    model="m", input="?", max_output_tokens=3, stream=True
                )
                *_, last = [event async for event in events]
                assert last.type == "response.incomplete"
                response = last.response
            else:
                response = await client.responses.create(model="m", input="?", max_output_tokens=3)
            assert response.status == "incomplete"
            assert response.incomplete_details.reason == "max_output_tokens"
            # Empty answers exist too, and can be gone on from.
            proxy.engine.says("<|im_end|>", "ok<|im_end|>")
            empty = await client.responses.create(model="m", input="x")
            sent: Any = [{"role": "user", "content": "x"}, *items_of(empty)]
            await client.responses.create(
                model="m", input=[*sent, {"role": "user", "content": "y"}]
            )
        assert rollout.turns()[-1].fork is Fork.NONE

    proxied(work)


def test_kept_answers_are_the_rollouts_own(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        one, two = await proxy.open(), await proxy.open()
        async with one.client(max_retries=3) as client, two.client(max_retries=3) as other:
            response = await ask(client, True, input="?")
            again = await client.responses.retrieve(response.id)
            assert again.output_text == response.output_text
            hidden = await ask(client, False, input="?", store=False)
            for asker, name in ((client, hidden.id), (client, "resp_x"), (other, response.id)):
                with pytest.raises(openai.NotFoundError):
                    await asker.responses.retrieve(name)
                with pytest.raises(openai.BadRequestError, match="not found") as caught:
                    await ask(asker, False, input="?", previous_response_id=name)
                assert caught.value.param == "previous_response_id"
            await client.responses.delete(response.id)
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(response.id)

    proxied(work)


def test_tools_that_are_no_plain_functions(proxied: Any) -> None:
    tools: Any = [
        {"type": "custom", "name": "apply_patch", "description": "Patches.", "format": {
            "type": "grammar", "syntax": "lark", "definition": "start: /x+/"}},
        {"type": "local_shell"},
        {"type": "namespace", "name": "mcp", "description": "", "tools": [
            {"type": "function", "name": "read", "parameters": {"type": "object"}}]},
    ]  # fmt: skip
    said = [
        {"name": "apply_patch", "arguments": {"input": "xx\n"}},
        {"name": "local_shell", "arguments": {"command": ["ls", "-l"], "timeout_ms": 5}},
        {"name": "mcp__read", "arguments": {"path": "a"}},
    ]

    async def work(proxy: Any) -> None:
        calls = "".join(f"<tool_call>{json.dumps(call)}</tool_call>" for call in said)
        proxy.engine.says(f"{calls}<|im_end|>", "ok<|im_end|>")
        rollout = await proxy.open()
        async with rollout.client() as client:
            for stream in (False, True):
                proxy.engine.says(f"{calls}<|im_end|>", "ok<|im_end|>")
                response = await ask(client, stream, input=f"{stream}?", tools=tools)
                patch, shell, read = response.output
                assert (patch.type, patch.name, patch.input) == (
                    "custom_tool_call",
                    "apply_patch",
                    "xx\n",
                )
                assert (shell.type, shell.action.command) == ("local_shell_call", ["ls", "-l"])
                assert (read.type, read.namespace, read.name) == ("function_call", "mcp", "read")
                results = [
                    {"type": "custom_tool_call_output", "call_id": patch.call_id, "output": "a"},
                    {"type": "local_shell_call_output", "id": shell.call_id, "output": "b"},
                    {"type": "function_call_output", "call_id": read.call_id, "output": [
                        {"type": "input_text", "text": "c"}]},
                ]  # fmt: skip
                history: Any = [{"role": "user", "content": f"{stream}?"}, *items_of(response)]
                await ask(client, stream, input=[*history, *results], tools=tools)
        forks = [turn.fork for turn in rollout.turns()]
        assert forks == [Fork.ROOT, Fork.NONE, Fork.NEW_CONVERSATION, Fork.NONE]
        prompt = proxy.engine.vocabulary.decode(proxy.engine.requests[0].prompt_token_ids)
        assert "lark grammar:\\nstart: /x+/" in prompt

    proxied(work)


def test_errors_are_the_sdks_and_not_retried(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        async with rollout.client(max_retries=3) as client:
            with pytest.raises(openai.BadRequestError) as caught:
                await ask(client, True, input="seven " * 100)
            assert caught.value.code == "context_length_exceeded"
            with pytest.raises(openai.BadRequestError, match="web_search") as caught:
                await ask(client, False, input="?", tools=[{"type": "web_search"}])
            assert caught.value.param == "tools[0].type"
            with pytest.raises(openai.BadRequestError, match="embeddings"):
                await client.embeddings.create(model="m", input="x")
            proxy.engine.fail = "out of memory"
            with pytest.raises(openai.InternalServerError, match="out of memory"):
                await ask(client, False, input="?")
        async with rollout.client(max_retries=3, api_key="sk-none") as client:
            with pytest.raises(openai.AuthenticationError):
                await ask(client, False, input="?")
        assert sum((await proxy.stats())["num_rejected"].values()) == 5

    proxied(work, max_model_len=64)


def test_an_engine_that_goes_in_mid_stream(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says("abc<|im_end|>")
        reached = asyncio.Event()

        async def gate(position: int) -> None:
            if position == 2:
                reached.set()
                await asyncio.Event().wait()

        proxy.engine.gate = gate
        rollout = await proxy.open()
        seen = []
        async with rollout.client() as client:
            stream = await client.responses.create(model="m", input="?", stream=True)
            await reached.wait()
            await proxy.engine_server.close()
            with pytest.raises(openai.APIError, match="engine"):
                async for event in stream:
                    seen.append(event)
        assert (seen[-1].type, seen[-1].response.error.code) == ("response.failed", "server_error")

    proxied(work, request_timeout_s=2.0)


def test_counting_input_tokens_records_nothing(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open(max_turns=2)
        async with rollout.client() as client:
            counted = await client.responses.input_tokens.count(model="m", input="7*8?")
            first = await client.responses.create(model="m", input="7*8?")
            assert counted.input_tokens == first.usage.input_tokens
            goes_on = {"model": "m", "input": "?", "previous_response_id": first.id}
            counted = await client.responses.input_tokens.count(**goes_on)
            second = await client.responses.create(**goes_on)
            assert counted.input_tokens == second.usage.input_tokens
        assert [turn.fork for turn in rollout.turns()] == [Fork.ROOT, Fork.NONE]

    proxied(work)


def test_a_websocket_is_answered_426(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        for more, status in ((b"connection: Upgrade\r\nupgrade: websocket\r\n", 426), (b"", 405)):
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            key = f"authorization: Bearer {rollout.key}\r\n".encode()
            writer.write(b"GET /v1/responses HTTP/1.1\r\nhost: x\r\n" + key + more + b"\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            assert int(head.split()[1]) == status
            writer.close()

    proxied(work)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "web_search_call"}]}, "input[0].type"),
        ({"input": [{"role": "wizard", "content": ""}]}, "input[0].role"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": [{"type": "function_call", "call_id": "c"}]}, "input[0].name"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].id"),
        ({"input": [{"type": "item_reference", "id": None}]}, "input[0].id"),
        ({"tools": [{"type": "file_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "namespace", "name": "n", "tools": [{}]}]}, "tools[0].tools[0].type"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"background": True}, "background"),
        ({"truncation": "left"}, "truncation"),
        ({"conversation": "c"}, "conversation"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_invalid_requests_name_the_field(change: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as caught:
        body = json.dumps({"model": "m", "input": "?"} | change).encode()
        responses.parse(Asked(body))
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize("key", ["metadata", "user", "reasoning"])
def test_what_an_answer_repeats_is_bounded(key: str) -> None:
    body = {"input": "?", "instructions": "i", key: {"x": "y" * responses.MAX_ECHO_BYTES}}
    with pytest.raises(Refusal, match=f"repeats of the request .{key} and others") as caught:
        responses.parse(Asked(json.dumps(body).encode()))
    assert (caught.value.status, caught.value.param) == (400, key)


def test_nulls_and_unknown_fields_are_taken() -> None:
    known = "tools tool_choice text reasoning include store metadata prompt_cache_key user stream"
    known += " instructions max_output_tokens temperature top_p truncation previous_response_id"
    body: dict[str, Any] = dict.fromkeys([*known.split(), "parallel_tool_calls", "service_tier"])
    body |= {"input": "?", "client_metadata": {"x": 1}}
    call = responses.parse(Asked(json.dumps(body).encode()))
    assert (call.tools, call.stream, call.parallel_tool_calls) == ((), False, True)
    assert call.conversation == call.messages
