"""An SDK that repeats a call whose answer it never got: the answer it went on from is trained."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest

from areal_sub.records import Fork, Masked
from areal_sub.trajectory.causes import causes, lost_answers
from areal_sub.trajectory.samples import rollout_samples

TOOL = {"type": "function", "function": {"name": "calc", "parameters": {"type": "object"}}}
HEAD_END = b"\r\n\r\n"


@asynccontextmanager
async def cutting(port: int, cut: set[int]) -> AsyncIterator[int]:
    """A port before the proxy's, one call per connection; of the calls in `cut`, counted from 0,
    the answer is read to its end, and the connection closed instead of passing it on."""
    num_calls = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_calls
        index, num_calls = num_calls, num_calls + 1
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            head = await reader.readuntil(HEAD_END)
            fields = dict(
                line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line
            )
            body = await reader.readexactly(int(fields[b"content-length"]))
            lines = [line for line in head.split(b"\r\n") if line[:11].lower() != b"connection:"]
            lines.insert(1, b"Connection: close")
            up_writer.write(b"\r\n".join(lines) + body)
            answer = await up_reader.read()
            if index not in cut:
                writer.write(answer)
                await writer.drain()
        finally:
            for each in (up_writer, writer):
                each.close()
                with suppress(ConnectionError):
                    await each.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def check_all_counted(rollout: Any, lost: list[str]) -> None:
    whole = rollout.trajectory()
    assert lost_answers(whole) == set(lost)
    num_lost = sum(len(whole.turns[turn_id].token_ids) for turn_id in lost)
    assert num_lost
    out = rollout_samples(whole, export_style="concat", turn_discount=1.0, credit="all")
    assert out.masked == {Masked.LOST_ANSWER: num_lost}
    num_trained = sum(sample.num_trained_tokens for sample in out.samples)
    assert num_trained + num_lost == sum(len(turn.token_ids) for turn in whole.turns.values())


def test_the_openai_sdk_repeats_calls_whose_connection_was_cut(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        # As an answer is often the same twice: what tells them apart is the order.
        proxy.engine.says("one<|im_end|>", "one<|im_end|>", "two<|im_end|>", "three<|im_end|>")
        rollout = await proxy.open()
        async with cutting(proxy.port, {0, 2}) as port:
            client = rollout.client(base_url=f"http://127.0.0.1:{port}/v1", max_retries=2)
            messages: list[Any] = [{"role": "user", "content": "Hi"}]
            first = await client.chat.completions.create(model="m", messages=messages)
            messages += [first.choices[0].message, {"role": "user", "content": "More"}]
            last = await client.chat.completions.create(model="m", messages=messages)
            await client.close()
        assert last.choices[0].message.content == "three"
        await rollout.end()
        lost1, kept1, lost2, kept2 = rollout.turns()
        assert [turn.retry for turn in rollout.turns()] == [0, 1, 0, 1]
        assert (kept1.turn_id, kept2.turn_id) == (first.id, last.id)
        assert lost2.parent_turn_id == kept2.parent_turn_id == first.id
        check_all_counted(rollout, [lost1.turn_id, lost2.turn_id])
        assert list(causes(rollout.trajectory()).values()) == [
            Fork.LOST_ANSWER,
            Fork.ROOT,
            Fork.LOST_ANSWER,
            Fork.NONE,
        ]

    proxied(work)


def test_so_does_anthropics(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        async with cutting(proxy.port, {0}) as port:
            url = f"http://127.0.0.1:{port}"
            client = rollout.anthropic(base_url=url, max_retries=2)
            answer = await client.messages.create(
                model="m", max_tokens=9, messages=[{"role": "user", "content": "Hi"}]
            )
            await client.close()
        await rollout.end()
        lost, kept = rollout.turns()
        assert kept.turn_id == answer.id
        check_all_counted(rollout, [lost.turn_id])

    proxied(work)


def test_an_agent_that_asks_again_after_a_cut_stream(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says("one two three four<|im_end|>")
        held = asyncio.Event()

        async def gate(position: int) -> None:
            if position and not held.is_set():
                await asyncio.Event().wait()

        proxy.engine.gate = gate
        rollout = await proxy.open()
        async with rollout.client() as client:
            messages: list[Any] = [{"role": "user", "content": "Hi"}]
            stream = await client.chat.completions.create(model="m", messages=messages, stream=True)
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    break
            await stream.close()
            await proxy.engine.until(lambda: proxy.engine.num_aborted == 1)
            held.set()
            answer = await client.chat.completions.create(model="m", messages=messages)
        await rollout.end()
        by_id = {turn.turn_id: turn for turn in rollout.turns()}
        assert by_id.pop(answer.id).finish_reason == "stop"
        (cut,) = by_id.values()
        assert cut.finish_reason == "aborted"
        check_all_counted(rollout, [cut.turn_id])

    proxied(work)


def test_what_is_asked_twice_on_purpose_is_trained_twice(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        async with rollout.client() as client:
            for _ in range(2):
                await client.chat.completions.create(
                    model="m",
                    messages=[{"role": "user", "content": "Hi"}],
                    n=2,
                    tools=[TOOL],  # type: ignore[list-item]
                )
        await rollout.end()
        whole = rollout.trajectory()
        assert lost_answers(whole) == frozenset()
        assert [turn.num_tools for turn in whole.turns.values()] == [1] * 4
        assert len({turn.answer_id for turn in whole.turns.values()}) == 2
        assert list(causes(whole).values()) == [
            Fork.ROOT,
            Fork.CHOICE,
            Fork.RESAMPLE,
            Fork.CHOICE,
        ]

    proxied(work)


@pytest.mark.parametrize("count", ["", "-1", "1e3", "²", "1" * 5000])
def test_a_count_that_is_none_is_none(proxied: Any, count: str) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        headers = {
            b"authorization": f"Bearer {rollout.key}".encode(),
            b"x-stainless-retry-count": count.encode("latin-1"),
        }
        body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
        async with httpx.AsyncClient() as client:
            answer = await client.post(
                f"{rollout.base_url}/chat/completions", json=body, headers=headers
            )
        assert answer.status_code == 200
        assert rollout.turns()[0].retry == 0

    proxied(work)
