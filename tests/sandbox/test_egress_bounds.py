"""Deadlines, bounds and decisions of the egress proxy, in this process: its limits made small."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from sandbox import egress
from sandbox.allowlist import Allowlist, HostPort

Handle = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Lab:
    """One child of a proxy, and one server that is listed as 127.0.0.1 and as server.example."""

    def __init__(self, port: int, server: str, leash: socket.socket, child: Any) -> None:
        self._port = port
        self.server = server
        self._leash = leash
        self._child = child

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self._port)

    async def say(self, text: str) -> str:
        """Everything that comes back until the proxy ends the connection."""
        reader, writer = await self.connect()
        async with asyncio.timeout(20):
            writer.write(text.encode())
            said = b""
            with contextlib.suppress(ConnectionResetError):
                said = await reader.read()
        writer.close()
        return said.decode()

    async def end(self) -> Any:
        self._leash.shutdown(socket.SHUT_WR)
        refused = await asyncio.get_running_loop().sock_recv(self._leash, 2**16)
        await self._child
        return json.loads(refused)


@contextlib.asynccontextmanager
async def lab(serve: Handle, *more: str, num_connections: int = 100) -> AsyncIterator[Lab]:
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    number = server.sockets[0].getsockname()[1]
    entries = [f"127.0.0.1:{number}", *(f"{name}:{number}" for name in more)]
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near.setblocking(False)
    proxy = egress.Egress(Allowlist(entries), num_connections=num_connections)
    child = asyncio.ensure_future(egress.Child(proxy, listener).serve(far))
    async with server:
        with near:
            yield Lab(listener.getsockname()[1], f"127.0.0.1:{number}", near, child)
            if not child.done():
                near.shutdown(socket.SHUT_WR)
                await child
    proxy.threads.shutdown()


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


def answering(text: str) -> Handle:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(text.encode())
        await writer.drain()
        writer.close()

    return serve


def test_heads_that_are_slow_or_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(egress, "HEAD_TIMEOUT_S", 0.2)

    async def go() -> list[str]:
        async with lab(silent) as one:
            texts = ["GET http://a.example/ HTTP/1.1\r\nX: ", "GET / HTTP/1.1\r\nX: " + "x" * 10**6]
            return [await one.say(text) for text in texts]

    slow, large = asyncio.run(go())
    assert slow.startswith("HTTP/1.1 408 the head did not come within 0.2 s\r\n")
    assert large.startswith("HTTP/1.1 431 the head is larger than 32768 bytes\r\n")


def test_a_connection_where_nothing_moves_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(egress, "IDLE_TIMEOUT_S", 0.2)

    async def go() -> tuple[str, str]:
        async with lab(silent) as one:
            return (
                await one.say(f"CONNECT {one.server} HTTP/1.1\r\n\r\nhello"),
                await one.say(f"GET http://{one.server}/ HTTP/1.1\r\n\r\n"),
            )

    assert asyncio.run(go()) == ("HTTP/1.1 200 Connection established\r\n\r\n", "")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nConnection: x\r\nA: b\r\n\r\nhi",
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nA: b\r\nConnection: close\r\n\r\nhi",
        ),
        ("SSH-2.0\r\n\r\n", "HTTP/1.1 502 the server's answer is not HTTP/1.1\r\n"),
        ("HTTP/1.1 200 OK\r\n", "HTTP/1.1 502 the server's answer is not HTTP/1.1\r\n"),
        (f"HTTP/1.1 200 OK\r\nA: {'b' * 10**6}\r\n\r\n", "HTTP/1.1 502 the server's answer"),
        ("", "HTTP/1.1 502 the server's answer is not HTTP/1.1\r\n"),
    ],
)
def test_answers_are_passed_on_where_they_are_http(answer: str, said: str) -> None:
    async def go() -> str:
        async with lab(answering(answer)) as one:
            return await one.say(f"GET http://{one.server}/ HTTP/1.1\r\n\r\n")

    assert asyncio.run(go()).startswith(said)


def test_more_connections_than_one_child_may_have_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(egress, "MAX_CONNECTIONS", 2)

    async def go() -> None:
        async with lab(silent) as one:
            held = [await one.connect() for _ in range(3)]
            for reader, writer in held[:2]:
                writer.write(f"CONNECT {one.server} HTTP/1.1\r\n\r\n".encode())
                assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
            reader, writer = held[2]
            writer.write(b"CONNECT b.example:1 HTTP/1.1\r\n\r\n")
            waiting = asyncio.ensure_future(reader.read())
            done, _ = await asyncio.wait({waiting}, timeout=0.2)
            assert not done
            held[0][1].close()
            async with asyncio.timeout(10):
                assert b" 403 " in await waiting
            for _, each in held:
                each.close()

    asyncio.run(go())


def test_the_slots_of_all_children_come_back() -> None:
    async def go() -> None:
        async with lab(answering("HTTP/1.1 204 No\r\n\r\n"), num_connections=1) as one:
            for _ in range(5):
                said = await one.say(f"GET http://{one.server}/ HTTP/1.1\r\n\r\n")
                assert said.startswith("HTTP/1.1 204")
            assert await one.end() == {}

    asyncio.run(go())


def test_a_name_is_resolved_once_and_its_address_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of names that answers otherwise the second time is not asked a second time."""
    asked: list[str] = []
    answers: list[list[str]] = []

    def addresses(wanted: HostPort) -> list[str]:
        asked.append(wanted.host)
        return answers.pop(0)

    monkeypatch.setattr(egress, "_addresses", addresses)
    served = answering("HTTP/1.1 204 No\r\n\r\n")

    async def go() -> tuple[list[str], Any]:
        async with lab(served, "rebound.example") as one:
            port = one.server.rpartition(":")[2]
            said = []
            for found in (
                ["169.254.169.254"],
                ["10.0.0.1", "fd00::1", "::1", "127.0.0.2"],
                ["10.0.0.1", "127.0.0.1", "127.0.0.2"],  # the second is listed itself
            ):
                answers[:] = [found, ["127.0.0.2"]]
                said.append(await one.say(f"GET http://rebound.example:{port}/ HTTP/1.1\r\n\r\n"))
            return said, await one.end()

    said, refused = asyncio.run(go())
    assert "is at 169.254.169.254, which is not public" in said[0]
    assert "is at 10.0.0.1, which is not public" in said[1]
    assert said[2].startswith("HTTP/1.1 204")
    assert asked == ["rebound.example"] * 3
    assert list(refused.values()) == [2]


def test_a_public_address_of_this_machine_itself_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sandbox.allowlist.is_public", lambda address: True)
    monkeypatch.setattr(egress, "_addresses", lambda wanted: ["127.0.0.2"])
    seen = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.read())
        writer.close()

    async def go() -> str:
        async with lab(silent, "own.example") as one:
            port = int(one.server.rpartition(":")[2])
            # From the same address: as where a machine calls one of its own.
            async with await asyncio.start_server(serve, "127.0.0.2", port):
                honest = egress._connect

                async def connect(address: str, port: int) -> socket.socket:
                    client = socket.socket()
                    client.setblocking(False)
                    client.bind((address, 0))
                    await asyncio.get_running_loop().sock_connect(client, (address, port))
                    return client

                monkeypatch.setattr(egress, "_connect", connect)
                said = await one.say(f"GET http://own.example:{port}/ HTTP/1.1\r\n\r\n")
                monkeypatch.setattr(egress, "_connect", honest)
                return said

    said = asyncio.run(go())
    assert (
        "is this machine itself: allowed only where sandbox.network.allow lists 127.0.0.2" in said
    )
    assert seen == [b""], "not a byte was sent"


def test_what_is_refused_is_counted_within_bounds() -> None:
    async def go() -> Any:
        async with lab(silent) as one:
            for number in range(egress.MAX_REFUSED + 5):
                await one.say(f"CONNECT h{number}.{'x' * 60}.example:443 HTTP/1.1\r\n\r\n")
            await one.say("CONNECT h0.{}.example:443 HTTP/1.1\r\n\r\n".format("x" * 60))
            return await one.end()

    refused = asyncio.run(go())
    assert len(refused) == egress.MAX_REFUSED + 1
    assert refused.pop("others") == 5
    assert refused.pop(f"h0.{'x' * 60}.example:443") == 2
    assert set(refused.values()) == {1}
