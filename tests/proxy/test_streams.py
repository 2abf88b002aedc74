"""Streams of every dialect through its SDK: token by token, and ended with who reads or writes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import anthropic
import openai
import pytest
from google.genai import errors

from areal_sub.proxy.dialects import chat as chat_dialect
from areal_sub.proxy.neutral import Call, Delta, Message, TokenLogprob, ToolCall

QUESTION: Any = {"role": "user", "content": "?"}
OnText = Callable[[str], None]


async def chat(rollout: Any, on_text: OnText) -> None:
    async with rollout.client() as client:
        async for chunk in await client.chat.completions.create(
            model="m", messages=[QUESTION], stream=True
        ):
            on_text(chunk.choices[0].delta.content or "")


async def completions(rollout: Any, on_text: OnText) -> None:
    async with rollout.client() as client:
        async for chunk in await client.completions.create(model="m", prompt="?", stream=True):
            on_text(chunk.choices[0].text)


async def responses(rollout: Any, on_text: OnText) -> None:
    async with rollout.client() as client:
        async for event in await client.responses.create(model="m", input="?", stream=True):
            on_text(event.delta if event.type == "response.output_text.delta" else "")


async def messages(rollout: Any, on_text: OnText) -> None:
    async with (
        rollout.anthropic() as client,
        client.messages.stream(model="m", max_tokens=9, messages=[QUESTION]) as events,
    ):
        async for text in events.text_stream:
            on_text(text)


async def gemini(rollout: Any, on_text: OnText) -> None:
    client = rollout.gemini()
    try:
        async for chunk in await client.models.generate_content_stream(model="m", contents="?"):
            on_text(chunk.text or "")
    finally:
        await client.aclose()


Read = Callable[[Any, OnText], Awaitable[None]]
ERRORS: dict[Read, type[Exception]] = {
    chat: openai.APIError,
    completions: openai.APIError,
    responses: openai.APIError,
    messages: anthropic.APIStatusError,
    gemini: errors.ServerError,
}
every_dialect = pytest.mark.parametrize("read", ERRORS, ids=lambda read: read.__name__)


def gate_at(proxy: Any, position: int) -> asyncio.Event:
    """The engine stops before this token, for ever; set when it does."""
    reached = asyncio.Event()

    async def gate(at: int) -> None:
        if at == position:
            reached.set()
            await asyncio.Event().wait()

    proxy.engine.gate = gate
    return reached


@every_dialect
def test_the_first_token_arrives_before_the_second_is_sampled(proxied: Any, read: Read) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says("abc<|im_end|>")
        seen = asyncio.Event()
        texts: list[str] = []

        async def gate(position: int) -> None:
            if position == 1:
                await seen.wait()

        def on_text(text: str) -> None:
            if text:
                assert texts or len(proxy.engine.sampled[0]) == 1
                texts.append(text)
                seen.set()

        proxy.engine.gate = gate
        await read(await proxy.open(), on_text)
        assert "".join(texts) == "abc"

    proxied(work)


@every_dialect
def test_hanging_up_aborts_the_generation_and_records_what_was_sampled(
    proxied: Any, read: Read
) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says("abc<|im_end|>")
        reached = gate_at(proxy, 2)
        rollout = await proxy.open()
        reading = asyncio.ensure_future(read(rollout, lambda text: None))
        await reached.wait()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await proxy.engine.until(lambda: proxy.engine.num_aborted == 1)
        await rollout.end()
        [turn] = rollout.turns()
        assert turn.finish_reason == "aborted"
        assert turn.token_ids.tolist() == proxy.engine.sampled[0][:2]

    proxied(work)


@every_dialect
def test_an_engine_that_goes_in_mid_stream_is_the_sdks_error(proxied: Any, read: Read) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says("abc<|im_end|>")
        reached = gate_at(proxy, 2)
        reading = asyncio.ensure_future(read(await proxy.open(), lambda text: None))
        await reached.wait()
        await proxy.engine_server.close()
        with pytest.raises(ERRORS[read], match="engine"):
            await reading

    proxied(work, request_timeout_s=2.0)


def test_each_call_of_a_chat_has_a_chunk_of_its_own() -> None:
    """As OpenAI's have: LlamaIndex takes the first of a chunk's calls."""
    call = Call(dialect="chat", model="m", messages=(Message("user"),), stream=True)
    delta = Delta([ToolCall(name, name, "{}") for name in ("f", "g", "h")])
    delta.logprobs = [TokenLogprob("f", -1.0, b"f")]
    chunks = [
        json.loads(event.removeprefix(b"data: "))["choices"][0]
        for event in chat_dialect.stream("chatcmpl-1", call, 1).events(0, delta)
    ]
    calls = [called for chunk in chunks for called in chunk["delta"]["tool_calls"]]
    assert len(chunks) == 3
    assert [(called["index"], called["id"]) for called in calls] == [(0, "f"), (1, "g"), (2, "h")]
    assert [bool(chunk["logprobs"]) for chunk in chunks] == [True, False, False]
    assert [chunk["delta"].get("role") for chunk in chunks] == ["assistant", None, None]


@pytest.mark.parametrize("text", ["", "I'll look."])
def test_a_call_of_a_chat_does_not_stand_behind_a_text(text: str) -> None:
    """Nor behind an empty one, as OpenAI's do not: of a chunk with both Griptape takes the text."""
    call = Call(dialect="chat", model="m", messages=(Message("user"),), stream=True)
    stream = chat_dialect.stream("chatcmpl-1", call, 1)
    events = [*stream.events(0, Delta([*([text] * bool(text)), ToolCall("f", "f", "{}")]))]
    deltas = [json.loads(each.removeprefix(b"data: "))["choices"][0]["delta"] for each in events]
    assert [(each.get("content"), "tool_calls" in each) for each in deltas] == (
        [(text, False), (None, True)] if text else [(None, True)]
    )
