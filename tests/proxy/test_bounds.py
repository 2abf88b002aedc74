"""What one rollout may take of the proxy, so that others do not notice: attacks 62 and 63."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from areal_sub.proxy import app, connection, listeners, sessions
from areal_sub.proxy.dialects import Asked, chat
from areal_sub.proxy.refusals import Refusal

MESSAGES: Any = [{"role": "user", "content": "?"}]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def call(key: str, **body: Any) -> bytes:
    raw = json.dumps({"messages": MESSAGES, **body}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\nauthorization: Bearer {key}\r\n"
    return f"{head}content-length: {len(raw)}\r\n\r\n".encode() + raw


async def status(streams: Streams) -> int:
    """Of the next answer; 0 where the connection was cut."""
    try:
        head = await streams[0].readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return 0
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
    await streams[0].readexactly(length)
    return int(head.split()[1])


def test_idle_connections_make_room_and_busy_ones_do_not(
    proxied: Any, hand_over: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listeners, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(connection, "GRACE_S", 0.0)

    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        port = hand_over(rollout.rollout_id)

        async def connect(raw: bytes) -> Streams:
            streams = await asyncio.open_connection("127.0.0.1", port)
            streams[1].write(raw)
            return streams

        known = await connect(call(rollout.key))
        assert await status(known) == 200
        slow = await connect(b"POST /v1/chat/completions HTTP/1.1\r\nx: ")
        third = await connect(call(rollout.key))
        assert await status(third) == 200
        assert await status(slow) == 0, "who never had an answer goes first"
        asked, go = held(proxy)
        for streams in (known, third):
            streams[1].write(call(rollout.key, stream=False))
        await asked.get(), await asked.get()
        waiting = await connect(call(rollout.key))
        answered = asyncio.ensure_future(status(waiting))
        go.set()
        assert [await status(known), await status(third), await answered] == [200, 200, 200]
        for streams in (known, slow, third, waiting):
            streams[1].close()

    proxied(work)


def held(proxy: Any, since: int = 0) -> tuple[asyncio.Queue[int], asyncio.Event]:
    """From now on the engine says that it was asked, and answers when it may; all of it, or from
    its token `since` on."""
    asked: asyncio.Queue[int] = asyncio.Queue()
    go = asyncio.Event()

    async def gate(position: int) -> None:
        asked.put_nowait(position)
        if position >= since:
            await go.wait()

    proxy.engine.gate = gate
    return asked, go


def test_a_head_that_does_not_end_is_hung_up_on(
    proxied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.1)

    async def work(proxy: Any) -> None:
        for raw in (b"", b"POST /v1/chat/completions HTTP/1.1\r\nx: "):
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.write(raw)
            assert await reader.read() == b""
            writer.close()

    proxied(work)


def test_a_body_that_does_not_end_is_refused(proxied: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "BODY_TIMEOUT_S", 0.1)

    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(call(rollout.key)[:-1])
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 400 ")
        assert b"did not arrive within 0.1 s" in await reader.readuntil(b"}")
        writer.close()

    proxied(work)


def test_calls_at_once_are_bounded_in_number(proxied: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_CALLS", 1)

    async def work(proxy: Any) -> None:
        asked, go = held(proxy)
        rollout, other = await proxy.open(), await proxy.open()
        one, two, theirs = [await asyncio.open_connection("127.0.0.1", proxy.port) for _ in "123"]
        one[1].write(call(rollout.key))
        await asked.get()
        two[1].write(call(rollout.key))
        head = await two[0].readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 429 ")
        assert b"x-should-retry" not in head, "later there is room"
        theirs[1].write(call(other.key))
        go.set()
        assert [await status(one), await status(theirs)] == [200, 200]
        one[1].write(call(rollout.key))
        assert await status(one) == 200
        assert (await proxy.stats())["num_rejected"] == {"too_many_calls": 1}
        for streams in (one, two, theirs):
            streams[1].close()

    proxied(work)


def test_calls_at_once_are_bounded_in_bytes(proxied: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_CALLS_BYTES", 1000)

    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        one, two = [await asyncio.open_connection("127.0.0.1", proxy.port) for _ in "12"]
        whole = call(rollout.key, user="x" * 600)
        one[1].write(whole[:-1])
        two[1].write(whole)
        assert await status(two) == 413
        one[1].write(whole[-1:])
        assert await status(one) == 200
        two[1].write(whole)
        assert await status(two) == 200, "it is free again"
        for streams in (one, two):
            streams[1].close()

    proxied(work)


def test_a_stream_that_is_not_read_counts_until_its_end(
    proxied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "MAX_CALLS_BYTES", 1000)

    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        asked, go = held(proxy, since=1)
        one, two = [await asyncio.open_connection("127.0.0.1", proxy.port) for _ in "12"]
        one[1].write(call(rollout.key, user="x" * 600, stream=True))
        while await asked.get() < 1:
            pass
        two[1].write(call(rollout.key, user="x" * 600))
        assert await status(two) == 413
        go.set()
        await one[0].readuntil(b"[DONE]")
        await one[0].readuntil(b"\r\n0\r\n\r\n")
        two[1].write(call(rollout.key, user="x" * 600))
        assert await status(two) == 200, "it is free again"
        for streams in (one, two):
            streams[1].close()

    proxied(work)


@pytest.mark.parametrize("what", ["chunks", "fields", "parameters"])
def test_what_is_many_in_one_piece_is_refused(proxied: Any, what: str) -> None:
    """To read it would hold up the loop, which is everybody's."""

    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        key = f"authorization: Bearer {rollout.key}\r\nhost: h\r\n"
        post = f"POST /v1/chat/completions HTTP/1.1\r\n{key}transfer-encoding: chunked\r\n\r\n"
        raw = {
            "chunks": post + "1\r\nx\r\n" * 5000,
            "fields": f"GET /v1/models HTTP/1.1\r\n{key}" + "a:\r\n" * 5000 + "\r\n",
            "parameters": f"GET /v1/models?{'a=b&' * 5000} HTTP/1.1\r\n{key}\r\n",
        }[what]
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(raw.encode())
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 400 ")
        writer.close()

    proxied(work)


def test_short_calls_of_one_rollout_are_read_between_those_of_others() -> None:
    sampling = sessions.Sampling(
        max_new_tokens=1, temperature=1.0, top_p=1.0, top_k=0, override_agent=False
    )
    many, other = [
        sessions.Session(rollout_id=name, key=name, max_turns=1, sampling=sampling)
        for name in ("many", "other")
    ]
    order: list[str] = []

    async def read(session: sessions.Session) -> None:
        await session.take_turn(is_long=False)
        order.append(session.rollout_id)

    async def work() -> None:
        await asyncio.gather(*(read(many) for _ in range(20)), read(other))

    asyncio.run(work())
    assert len(order) == 21
    assert order.index("other") < 3


@pytest.mark.parametrize("mark", ["1,", "[],", "{},"])
def test_bodies_that_are_much_when_they_are_read(mark: str) -> None:
    text = json.dumps({"messages": MESSAGES})[:-1]
    with pytest.raises(Refusal, match="more than"):
        chat.parse(Asked(f'{text}, "x": [{mark * 2**20}1]}}'.encode()))
    chat.parse(Asked(f'{text}, "x": [{mark * 2**16}1]}}'.encode()))


def test_what_cannot_be_short_enough_is_not_tokenized(proxied: Any) -> None:
    """Whatever part of the call it is that makes it long."""
    words = "word " * 2**16
    function = {"name": "f", "arguments": json.dumps({"a": words})}
    called = {"role": "assistant", "tool_calls": [{"id": "c", "function": function}]}
    tool = {"type": "function", "function": {"name": "f", "description": words}}

    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        asked = [{"tools": [tool]}, {"messages": [*MESSAGES, called, *MESSAGES]}]
        for body in asked:
            streams = await asyncio.open_connection("127.0.0.1", proxy.port)
            streams[1].write(call(rollout.key, **body))
            assert (await streams[0].readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 400 ")
            streams[1].close()
        assert (await proxy.stats())["num_rejected"] == {"context_length_exceeded": 2}

    proxied(work)


def test_nothing_stays_of_a_call_that_is_refused(proxied: Any) -> None:
    """It counts against no limit, so there may be any number of them."""

    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        streams = await asyncio.open_connection("127.0.0.1", proxy.port)
        choice = {"type": "function", "function": {"name": "none"}}
        streams[1].write(call(rollout.key, tool_choice=choice))
        assert await status(streams) == 400
        streams[1].write(call(rollout.key))
        assert await status(streams) == 200
        assert [turn.fork for turn in rollout.turns()] == ["root"]
        streams[1].close()

    proxied(work)
