"""Anthropic's Messages through the real SDK, over real sockets."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx
import pytest

from areal_sub.proxy.dialects import Asked, messages
from areal_sub.proxy.refusals import Refusal
from areal_sub.records import Fork

CALC: Any = {"name": "calc", "input_schema": {"type": "object"}, "cache_control": None}
CALL = '<tool_call>\n{"name": "calc", "arguments": {"a": 7, "b": 8}}\n</tool_call>'


def user(content: Any) -> Any:
    return {"role": "user", "content": content}


async def ask(client: anthropic.AsyncAnthropic, stream: bool, **asked: Any) -> Any:
    asked = {"model": "claude-x", "max_tokens": 99} | asked
    if not stream:
        return await client.messages.create(**asked)
    async with client.messages.stream(**asked) as events:
        return await events.get_final_message()


@pytest.mark.parametrize("stream", [False, True])
def test_one_turn(proxied: Any, stream: bool) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says("56<|im_end|>")
        rollout = await proxy.open()
        system: Any = [
            {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}
        ]
        async with rollout.anthropic() as client:
            message = await ask(client, stream, system=system, messages=[user("7*8?")])
        assert message.id.startswith("msg_")
        assert [block.model_dump()["text"] for block in message.content] == ["56"]
        assert (message.stop_reason, message.model) == ("end_turn", "claude-x")
        [request], [sampled] = proxy.engine.requests, proxy.engine.sampled
        usage = message.usage
        assert (usage.input_tokens, usage.output_tokens) == (
            len(request.prompt_token_ids),
            len(sampled),
        )
        [turn] = rollout.turns()
        assert (turn.turn_id, turn.dialect, turn.model) == (message.id, "messages", "claude-x")
        assert proxy.engine.vocabulary.decode(request.prompt_token_ids) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n7*8?<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        await rollout.end(reward=None, turn_rewards={message.id: 0.5})
        assert proxy.records()[-1].turn_rewards == {message.id: 0.5}

    proxied(work)


@pytest.mark.parametrize("stream", [False, True])
def test_tool_turns_are_token_exact(proxied: Any, stream: bool) -> None:
    async def work(proxy: Any) -> None:
        thought = "<think>\nhm\n</think>\n\n"
        proxy.engine.says(
            f"{thought}I compute.\n{CALL}\n{CALL}\nSo<|im_end|>",
            f"{thought}56.<|im_end|>",
            "ok<|im_end|>",
        )
        rollout = await proxy.open()
        history: list[Any] = [user("7*8?")]
        asked: Any = {"tools": [CALC], "thinking": {"type": "enabled", "budget_tokens": 1024}}
        async with rollout.anthropic() as client:
            first = await ask(client, stream, messages=history, **asked)
            kinds = [block.type for block in first.content]
            assert kinds == ["thinking", "text", "tool_use", "tool_use", "text"]
            assert first.stop_reason == "tool_use"
            assert (first.content[0].thinking, first.content[1].text) == ("hm", "I compute.")
            assert first.content[2].input == {"a": 7, "b": 8}
            results = [
                {"type": "tool_result", "tool_use_id": block.id, "content": content}
                for block, content in zip(
                    first.content[2:4], ("56", [{"type": "text", "text": "56"}]), strict=True
                )
            ]
            text = {"type": "text", "text": "And now?"}
            dumped = [block.model_dump() for block in first.content]
            history += [{"role": "assistant", "content": dumped}, user([*results, text])]
            second = await ask(client, stream, messages=history, **asked)
            # The SDK's own objects, as most agents send them.
            history += [{"role": "assistant", "content": second.content}, user("Sure?")]
            await ask(client, stream, messages=history, **asked)
        one, two, three = rollout.turns()
        assert [turn.fork for turn in (one, two, three)] == [Fork.ROOT, Fork.NONE, Fork.NONE]
        assert (two.parent_turn_id, three.parent_turn_id) == (one.turn_id, two.turn_id)
        await rollout.end()
        prompt = proxy.engine.requests[2].prompt_token_ids.tolist()
        sequence = rollout.trajectory().sequence(three.turn_id).tolist()
        assert sequence == prompt + proxy.engine.sampled[2]
        decode = proxy.engine.vocabulary.decode
        assert decode(two.context_token_ids) == (
            "\n<|im_start|>user\n<tool_response>\n56\n</tool_response>"
            "\n<tool_response>\n56\n</tool_response><|im_end|>\n"
            "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"
        )

    proxied(work, reasoning_parser="think")


def test_dropping_the_thinking_blocks_is_a_fork_with_that_name(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says("<think>hm</think>56<|im_end|>", "ok<|im_end|>")
        rollout = await proxy.open()
        async with rollout.anthropic() as client:
            await ask(client, False, messages=[user("7*8?")])
            said = {"role": "assistant", "content": "56"}
            await ask(client, False, messages=[user("7*8?"), said, user("Sure?")])
        assert [turn.fork for turn in rollout.turns()] == [Fork.ROOT, Fork.REASONING_DROPPED]

    proxied(work, reasoning_parser="think")


def test_the_events_in_their_order(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says(f"<think>hm</think>a{CALL}<|im_end|>")
        rollout = await proxy.open()
        kinds: list[str] = []
        async with rollout.anthropic() as client:
            async for event in await client.messages.create(
                model="m", max_tokens=99, messages=[user("?")], tools=[CALC], stream=True
            ):
                kind = event.type
                if event.type == "content_block_delta":
                    kind = event.delta.type
                if not kinds or kinds[-1] != kind:
                    kinds.append(kind)
        start, stop = "content_block_start", "content_block_stop"
        assert kinds == [
            "message_start",
            *(start, "thinking_delta", "signature_delta", stop),
            *(start, "text_delta", stop),
            *(start, "input_json_delta", stop),
            *("message_delta", "message_stop"),
        ]

    proxied(work, reasoning_parser="think")


@pytest.mark.parametrize("stream", [False, True])
def test_why_it_stopped(proxied: Any, stream: bool) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        async with rollout.anthropic() as client:

            async def ended(says: str, **asked: Any) -> tuple[Any, Any, list[str]]:
                proxy.engine.says(says)
                message = await ask(client, stream, messages=[user("?")], **asked)
                texts = [block.text for block in message.content]
                return message.stop_reason, message.stop_sequence, texts

            stops = ["STOP", "x"]
            assert await ended("a STOP b<|im_end|>", stop_sequences=stops) == (
                "stop_sequence",
                "STOP",
                ["a "],
            )
            assert await ended("abcdef<|im_end|>", max_tokens=3) == ("max_tokens", None, ["abc"])
            assert await ended("<|im_end|>") == ("end_turn", None, [""])

    proxied(work)


def test_betas_threads_and_the_tool_runner(proxied: Any) -> None:
    """The runner asks for a thread first, is told that there are none, and sends its history."""

    @anthropic.beta_async_tool
    async def calc(a: int, b: int) -> str:
        """Multiply.

        Args:
            a: one
            b: the other
        """
        return str(a * b)

    async def work(proxy: Any) -> None:
        proxy.engine.says(f"{CALL}<|im_end|>", "56<|im_end|>")
        rollout = await proxy.open()
        async with rollout.anthropic(max_retries=3) as client:
            with pytest.raises(anthropic.BadRequestError) as caught:
                await client.beta.messages.create(
                    model="m",
                    max_tokens=9,
                    messages=[user("?")],
                    betas=["threads-2099-01-01"],
                    extra_body={"thread": {"type": "create"}},
                )
            body: Any = caught.value.body
            assert body["error"]["details"] == {
                "error_code": "thread_unsupported_request",
                "unsupported": ["thread"],
            }
            runner = client.beta.messages.tool_runner(
                model="m",
                max_tokens=99,
                tools=[calc],
                messages=[user("7*8?")],
                betas=["nobody-knows-2099-01-01"],
                context_management={"edits": [{"type": "clear_tool_uses_20250919"}]},
            )
            said = [message async for message in runner]
            assert said[-1].content[0].model_dump()["text"] == "56"
            assert said[-1].context_management.applied_edits == []
        assert [turn.fork for turn in rollout.turns()] == [Fork.ROOT, Fork.NONE]
        assert (await proxy.stats())["num_rejected"] == {"invalid_request": 2}

    proxied(work)


def test_counting_tokens_records_nothing(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open(max_turns=2)
        async with rollout.anthropic() as client:
            for _ in range(3):
                counted = await client.messages.count_tokens(model="m", messages=[user("7*8?")])
            message = await ask(client, False, messages=[user("7*8?")])
            assert counted.input_tokens == message.usage.input_tokens
            said = {"role": "assistant", "content": message.content}
            conversation = [user("7*8?"), said, user("?")]
            counted = await client.messages.count_tokens(model="m", messages=conversation)
            message = await ask(client, False, messages=conversation)
            assert counted.input_tokens == message.usage.input_tokens
        assert [turn.fork for turn in rollout.turns()] == [Fork.ROOT, Fork.NONE]

    proxied(work)


def test_errors_are_the_sdks_and_not_retried(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open(max_turns=2)

        async def refused(kind: Any, error: str, **asked: Any) -> Any:
            with pytest.raises(kind) as caught:
                await ask(client, False, **({"messages": [user("?")]} | asked))
            body: Any = caught.value.body
            assert (body["type"], body["error"]["type"]) == ("error", error)
            assert caught.value.request_id.startswith("req_")
            return caught.value

        bad = anthropic.BadRequestError
        async with rollout.anthropic(max_retries=3) as client:
            error = await refused(bad, "invalid_request_error", messages=[user("seven " * 100)])
            assert "prompt is too long" in str(error)
            await refused(bad, "invalid_request_error", tool_choice={"type": "any"}, tools=[CALC])
            large = [user("x" * 2**24)]
            await refused(anthropic.APIStatusError, "request_too_large", messages=large)
            with pytest.raises(anthropic.NotFoundError) as caught:
                await client.messages.batches.list()
            body: Any = caught.value.body
            assert body["error"]["type"] == "not_found_error"
            proxy.engine.fail = "out of memory"
            await refused(anthropic.InternalServerError, "api_error")
            await proxy.engine_server.close()  # it may come back, within the call's limit
            await refused(anthropic.InternalServerError, "timeout_error")
            await refused(bad, "invalid_request_error")  # the turn limit
        async with rollout.anthropic(max_retries=3, api_key="sk-none") as client:
            await refused(anthropic.AuthenticationError, "authentication_error")
        assert sum((await proxy.stats())["num_rejected"].values()) == 8

    proxied(work, max_model_len=64, request_timeout_s=3.0)


def test_paths_keys_probes_and_models(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        body = {"model": "m", "messages": [user("?")]}
        key = rollout.key
        async with httpx.AsyncClient(base_url=proxy.url) as http:
            for path, headers in (
                ("/v1/messages?beta=true", {"x-api-key": key}),
                ("/messages", {"authorization": f"Bearer {key}"}),
                (f"/k/{key}/v1/messages", {"x-api-key": "sk-hard-coded"}),
            ):
                answer = await http.post(path, json=body, headers=headers)
                assert answer.status_code == 200
                assert answer.headers["request-id"]
            for path in ("/", "/v1", "/v1/messages", f"/k/{key}"):
                assert (await http.head(path)).status_code == 200
            answer = await http.get("/v1/messages", headers={"x-api-key": key})
            assert (answer.status_code, answer.json()["type"]) == (405, "error")
            answer = await http.post(f"/k/{key}/v1/messages/x")
            assert answer.json()["error"]["type"] == "not_found_error"
        async with rollout.anthropic() as client:
            assert (await client.models.retrieve("claude-x")).display_name == "claude-x"
            assert [model.id async for model in client.models.list()] == ["policy"]

    proxied(work)


@pytest.mark.parametrize(
    ("kind", "name", "commands", "inserted"),
    [
        ("bash_20250124", "bash", None, None),
        ("text_editor_20241022", "str_replace_editor", {"insert", "undo_edit"}, "new_str"),
        ("text_editor_20250728", "str_replace_based_edit_tool", {"insert", "view"}, "insert_text"),
        ("memory_20250818", "memory", {"insert", "delete", "rename"}, "insert_text"),
    ],
)
def test_tools_that_anthropics_models_know_are_told_to_the_policy(
    kind: str, name: str, commands: set[str] | None, inserted: str | None
) -> None:
    asked = {"messages": [user("?")], "tools": [{"type": kind, "name": name}]}
    [tool] = messages.parse(Asked(json.dumps(asked).encode())).tools
    function = tool["function"]
    assert (function["name"], bool(function["description"])) == (name, True)
    properties = function["parameters"]["properties"]
    if commands is None or inserted is None:
        assert properties.keys() == {"command", "restart"}
    else:
        assert commands <= set(properties["command"]["enum"])
        assert inserted in properties


def test_a_command_for_the_agents_bash_is_one(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        call = '<tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}\n</tool_call>'
        proxy.engine.says(f"{call}<|im_end|>", "a<|im_end|>")
        rollout = await proxy.open()
        tools: Any = [{"type": "bash_20250124", "name": "bash"}]
        async with rollout.anthropic() as client:
            first = await ask(client, False, messages=[user("?")], tools=tools)
            [use] = first.content
            assert (use.type, use.name, use.input) == ("tool_use", "bash", {"command": "ls"})
            result = {"type": "tool_result", "tool_use_id": use.id, "content": "a.py"}
            said = {"role": "assistant", "content": first.content}
            await ask(client, False, messages=[user("?"), said, user([result])], tools=tools)
        assert [turn.fork for turn in rollout.turns()] == [Fork.ROOT, Fork.NONE]

    proxied(work)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "computer_20250124", "name": "computer"}]}, "tools[0].type"),
        ({"tools": [{"type": ["bash_20250124"], "name": "bash"}]}, "tools[0].type"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].content"),
        ({"messages": [user([{"type": "image", "source": {}}])]}, "messages[0].content[0].type"),
        (
            {"messages": [user([{"type": "tool_result", "tool_use_id": "x", "content": [{}]}])]},
            "messages[0].content[0].content[0].type",
        ),
        ({"messages": [user([{"type": "tool_result"}])]}, "messages[0].content[0].tool_use_id"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
    ],
)
def test_invalid_requests_name_the_field(change: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as caught:
        body = json.dumps({"model": "m", "messages": [user("?")]} | change).encode()
        messages.parse(Asked(body))
    assert (caught.value.status, caught.value.param) == (400, param)


def test_what_is_tolerated() -> None:
    known = "tools tool_choice system thinking metadata stop_sequences stream service_tier thread"
    body: dict[str, Any] = dict.fromkeys([*known.split(), "temperature", "max_tokens"])
    redacted = {"type": "redacted_thinking", "data": "x"}
    body |= {
        "nobody_knows": 1,
        "messages": [
            {"role": "system", "content": "first"},
            user("a"),
            {"role": "assistant", "content": [redacted]},
            {"role": "system", "content": [{"type": "text", "text": "later"}]},
            user([{"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}]),
        ],
    }
    call = messages.parse(Asked(json.dumps(body).encode()))
    assert [(m.role, m.content) for m in call.messages] == [
        ("system", "first"),
        ("user", "a"),
        ("assistant", ""),
        ("system", "later"),
        ("user", "b"),
    ]
