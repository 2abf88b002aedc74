"""What the connection itself sees to: who hangs up, or takes nothing, ends what he asked for."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from areal_sub.proxy import connection
from areal_sub.proxy.connection import Connections, until_hung_up
from areal_sub.proxy.server import AgentServer

REQUEST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
HEAD = {"type": "http.response.start", "status": 200, "headers": []}


class Answering:
    """An app that answers each call with `work`, and what became of that."""

    def __init__(self, work: Callable[[Send], Any]) -> None:
        self.receive: Receive
        self.began = asyncio.Event()
        self.ended: asyncio.Future[BaseException | None] = (
            asyncio.get_running_loop().create_future()
        )
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.receive = receive
        self.began.set()
        try:
            with until_hung_up(Request(scope)):
                await self._work(send)
        except BaseException as error:
            self.ended.set_result(error)
        else:
            self.ended.set_result(None)


def serve(work: Callable[[Send], Any], use: Callable[[Answering, int], Any]) -> None:
    async def main() -> None:
        answering = Answering(work)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            port = listener.getsockname()[1]
            server = AgentServer(answering)
            serving = asyncio.ensure_future(server.serve(sockets=[]))
            among = Connections("the test", lambda: 8)
            accepting = asyncio.ensure_future(among.accept(listener, partial(server.protocol, {})))
            async with asyncio.timeout(20):
                await use(answering, port)
            accepting.cancel()
            await server.stop(serving)

    asyncio.run(main())


async def for_ever(send: Send) -> None:
    await asyncio.Event().wait()


async def without_end(send: Send) -> None:
    await send(HEAD)
    while True:
        await send({"type": "http.response.body", "body": bytes(2**20), "more_body": True})
        # Where the connection broke as it was written to, `send` does not wait.
        await asyncio.sleep(0)


def test_who_hangs_up_ends_what_he_asked_for() -> None:
    async def use(answering: Answering, port: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(REQUEST)
        await answering.began.wait()
        writer.close()
        assert isinstance(await answering.ended, ClientDisconnect)

    serve(for_ever, use)


def test_who_reads_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SEND_TIMEOUT_S", 0.1)

    async def use(answering: Answering, port: int) -> None:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(REQUEST)
            assert isinstance(await answering.ended, ClientDisconnect)

    serve(without_end, use)


def test_who_reads_slowly_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time that something was taken, the time begins anew."""
    timeout_s = 5.0
    monkeypatch.setattr(connection, "SEND_TIMEOUT_S", timeout_s)
    timers = []

    async def use(answering: Answering, port: int) -> None:
        loop = asyncio.get_running_loop()
        call_later = loop.call_later

        def noting(delay: float, *args: Any) -> asyncio.TimerHandle:
            timer = call_later(delay, *args)
            timers.extend([timer] if delay == timeout_s else [])
            return timer

        monkeypatch.setattr(loop, "call_later", noting)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(REQUEST)
        await reader.readexactly(64 * 2**20)
        writer.close()
        await answering.ended

    serve(without_end, use)
    assert len(timers) > 1 and all(timer.cancelled() for timer in timers)


def test_a_call_that_has_ended_is_not_cancelled_by_its_connection() -> None:
    async def at_once(send: Send) -> None:
        await send({**HEAD, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async def use(answering: Answering, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(REQUEST)
        await reader.readuntil(b"\r\n\r\n")
        writer.close()
        assert await answering.ended is None

    serve(at_once, use)


@pytest.mark.parametrize("method", [b"POST", b"HEAD"])
def test_a_head_comes_with_the_first_of_its_body(method: bytes) -> None:
    """Loopback has delivered what was sent when sending returns, so that nothing came is known."""
    sent, looked = asyncio.Event(), asyncio.Event()

    async def in_parts(send: Send) -> None:
        await send({**HEAD, "headers": [(b"content-length", b"2")]})
        sent.set()
        await looked.wait()
        await send({"type": "http.response.body", "body": b"ok"})

    async def use(answering: Answering, port: int) -> None:
        loop = asyncio.get_running_loop()
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(REQUEST.replace(b"POST", method))
            await sent.wait()
            client.setblocking(False)
            with pytest.raises(BlockingIOError):
                client.recv(1)
            looked.set()
            answer = await loop.sock_recv(client, 2**16)
            assert answer.startswith(b"HTTP/1.1 200 OK")
            assert answer.endswith(b"\r\n\r\n" + (b"ok" if method == b"POST" else b""))

    serve(in_parts, use)


def test_a_head_may_come_alone() -> None:
    looked = asyncio.Event()

    async def in_parts(send: Send) -> None:
        await send(HEAD)
        await send({"type": "http.response.body", "body": b"", "more_body": True})
        await looked.wait()
        await send({"type": "http.response.body", "body": b"ok"})

    async def use(answering: Answering, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(REQUEST.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
        looked.set()
        assert await reader.read() == b"2\r\nok\r\n0\r\n\r\n"
        writer.close()

    serve(in_parts, use)


OFFER = (
    b"connection: Upgrade, HTTP2-Settings\r\nhttp2-settings: AAEAAEAAAAIAAAAB\r\nupgrade: h2c\r\n"
)


@pytest.mark.parametrize("num_bytes", [1, 40, 10_000])
def test_an_offer_of_another_protocol_does_not_cost_the_body(num_bytes: int) -> None:
    """Java's client makes one with its first request, in `num_bytes` at a time here; the second,
    which is right behind it, is chunked."""
    length = b"POST / HTTP/1.1\r\n" + OFFER + b"content-length: 5\r\n\r\nhello"
    chunks = b"POST / HTTP/1.1\r\n" + OFFER + b"transfer-encoding: chunked\r\n\r\n"
    sent = length + chunks + b"2\r\nyo\r\n2\r\nu!\r\n0\r\n\r\n"

    async def echo(send: Send) -> None:
        body, more = b"", True
        while more:
            message = await answering.receive()
            body, more = body + message["body"], message["more_body"]
        answering.ended = asyncio.get_running_loop().create_future()  # of the next
        await send({**HEAD, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    async def use(given: Answering, port: int) -> None:
        nonlocal answering
        answering = given
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for at in range(0, len(sent), num_bytes):
            writer.write(sent[at : at + num_bytes])
            await writer.drain()
            await asyncio.sleep(0)
        for body in (b"hello", b"you!"):
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            assert await reader.readexactly(len(body)) == body
        writer.close()

    answering: Answering
    serve(echo, use)


def test_an_agent_that_waits_to_be_asked_for_its_body_is() -> None:
    asked: list[Answering] = []

    async def echo(send: Send) -> None:
        body = b""
        while not body:
            body = (await asked[0].receive())["body"]
        await send({**HEAD, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": body})

    async def use(answering: Answering, port: int) -> None:
        asked.append(answering)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        expecting = b"content-length: 2\r\nexpect: 100-continue"
        writer.write(REQUEST.replace(b"content-length: 0", expecting))
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"ok")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
        assert await reader.readexactly(2) == b"ok"
        writer.close()

    serve(echo, use)
