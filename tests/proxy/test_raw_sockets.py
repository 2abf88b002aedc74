"""Whatever bytes come, the proxy stays up, answers the next one, and does not grow."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from test_process import open_params, start

from areal_sub.rpc import Client

KEY = "key-of-r"
PATHS = (
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1beta/models/m:generateContent",
    "/v1/completions",
    "/v1/models",
)
WAIT_S = 20.0
NUM_PER_ROUND = 150
# Allocators keep pages of earlier peaks: what a leak of each request's body would take is more.
MAX_GROWTH_BYTES = 24 * 2**20

Rand = random.Random


def body_of(rand: Rand) -> bytes:
    deep = rand.choice([10, 64, 65, 1000, 100_000])
    return rand.choice(
        [
            b"",
            b"{",
            b"null",
            b"[]",
            b"\xff\xfe\x00",
            b'{"messages": [{"role": "user", "content": "\xff"}]}',
            b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
            b'{"messages": [{"role": "user", "content": "hi"}]}',
            b'{"messages": ' + b"[" * deep + b"]" * deep + b"}",
            b'{"messages": ' + b'{"a":' * deep + b"1" + b"}" * deep + b"}",
            b'{"n": 1e999, "messages": 1}',
            b'{"max_tokens": ' + b"9" * 5000 + b', "messages": []}',
            rand.randbytes(rand.randrange(2000)),
            json.dumps({"input": "x" * rand.randrange(100_000), "model": "\0"}).encode(),
        ]
    )


def chunked(rand: Rand, body: bytes) -> bytes:
    size = f"{len(body):x}".encode()
    return rand.choice(
        [
            size + b"\r\n" + body + b"\r\n0\r\n\r\n",
            size + b"\n" + body + b"\n0\n\n",  # bare LF
            b"-1\r\n" + body,
            b"ffffffffffffffffffff\r\n" + body,
            b"zz\r\n" + body + b"\r\n0\r\n\r\n",
            b"0x10\r\n" + body,
            size + b";ext=" + b"a" * 5000 + b"\r\n" + body + b"\r\n0\r\n\r\n",
            size + b"\r\n" + body,  # and no end
            size + b"\r\n" + body + b"\r\n0\r\nTrailer: " + b"x" * 70_000 + b"\r\n\r\n",
        ]
    )


def request(rand: Rand) -> tuple[bytes, bool]:
    """And whether it is whole: the proxy closes the connection behind it."""
    path, body = rand.choice(PATHS), body_of(rand)
    auth = rand.choice(
        [
            f"Authorization: Bearer {KEY}\r\n",
            f"x-api-key: {KEY}\r\n",
            "Authorization: Bearer \r\n",
            "x-api-key: \x00\r\n",
            "",
        ]
    ).encode("latin-1")
    length = f"Content-Length: {len(body)}\r\n".encode()
    te = b"Transfer-Encoding: chunked\r\n"
    line = f"POST {path} HTTP/1.1\r\nHost: h\r\n".encode() + auth
    if rand.random() < 0.15:
        return line + b"Connection: close\r\n" + length + b"\r\n" + body, True
    forms: list[Callable[[], bytes]] = [
        lambda: line + length + b"\r\n" + body,
        lambda: line + te + b"\r\n" + chunked(rand, body),
        lambda: line + length + te + b"\r\n" + chunked(rand, body),  # both
        lambda: line + te + length + b"\r\n" + body,
        lambda: line + length + length + b"\r\n" + body,  # twice
        lambda: line + b"Content-Length: 5, 6\r\n\r\n" + body,
        lambda: line + b"Content-Length: -1\r\n\r\n" + body,
        lambda: line + b"Content-Length: 99999999999999999999\r\n\r\n" + body,
        lambda: line + b"Content-Length: 17000000\r\n\r\n" + body,
        lambda: line + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + chunked(rand, body),
        lambda: line + b"Transfer-Encoding: xchunked\r\n\r\n" + body,
        lambda: line + b"Content-Length : 3\r\n\r\n" + body,
        lambda: line + b" folded: 1\r\n\r\n" + body,
        lambda: line.replace(b"\r\n", b"\n") + length + b"\n" + body,
        lambda: line + b"X-Large: " + b"a" * rand.choice([60_000, 70_000, 400_000]) + b"\r\n\r\n",
        lambda: line + b"".join(b"X-%d: 1\r\n" % i for i in range(3000)) + b"\r\n",
        lambda: line + b"Expect: 100-continue\r\n" + length + b"\r\n" + body,
        lambda: line + b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        lambda: line[: rand.randrange(len(line))],  # half a head
        lambda: line + length + b"\r\n" + body[: len(body) // 2],  # half a body
        lambda: line.replace(path.encode(), b"http://elsewhere" + path.encode()) + length + b"\r\n",
        lambda: b"CONNECT elsewhere:443 HTTP/1.1\r\nHost: elsewhere\r\n\r\n" + body,
        lambda: b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n",
        lambda: b"GET " + b"/" * 100_000 + b" HTTP/1.1\r\n\r\n",
        lambda: b"GET /v1/%ff%00/../..//x?key=%zz HTTP/1.1\r\nHost: h\r\n\r\n",
        lambda: b"GET /v1/models HTTP/9.9\r\n\r\n",
        lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        lambda: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rand.randbytes(500),
        lambda: rand.randbytes(rand.randrange(1, 3000)),
        lambda: (line + length + b"\r\n" + body) * 5,  # all at once
    ]
    return rand.choice(forms)(), False


async def send(port: int, data: bytes, *, is_whole: bool) -> bytes:
    """All that comes back for `data`. Unless it is whole, the end of what is sent says so."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        await writer.drain()
        if not is_whole:
            writer.write_eof()
        return await reader.read()
    except OSError:  # it was hung up on while it sent
        return b""
    finally:
        writer.close()


async def a_round(port: int, rand: Rand, statuses: Counter[bytes]) -> None:
    for _ in range(NUM_PER_ROUND):
        data, is_whole = request(rand)
        async with asyncio.timeout(WAIT_S):
            answer = await send(port, data, is_whole=is_whole)
        if answer:
            assert answer.startswith(b"HTTP/1.1 "), (data[:500], answer[:100])
            statuses[answer[9:12]] += 1


def test_whatever_bytes_come(engine_alone: Any, tmp_path: Path) -> None:
    async def work() -> None:
        async with engine_alone() as (engine, settings):
            engine.says("Hi<|im_end|>")
            process = await start(settings, tmp_path)
            assert process.stdin is not None and process.stderr is not None
            errors = asyncio.ensure_future(process.stderr.read())
            control = await Client.connect(
                Path(settings["control_path"]), peer="proxy", timeout_s=30
            )
            port = (await control.call("info", timeout_s=10))["agent_port"]
            opened = open_params("r", KEY) | {"max_turns": 10**6}
            await control.call("open_rollout", opened, timeout_s=10)
            watched, rand = psutil.Process(process.pid), Rand(7)
            statuses: Counter[bytes] = Counter()
            await a_round(port, rand, statuses)
            await a_round(port, rand, statuses)
            before, num_fds = watched.memory_info().rss, watched.num_fds()
            for _ in range(4):
                await a_round(port, rand, statuses)
            assert watched.memory_info().rss - before < MAX_GROWTH_BYTES
            assert watched.num_fds() <= num_fds + 8  # of connections just closed
            assert {b"200", b"400", b"401", b"404", b"413"} <= set(statuses), statuses
            assert not any(status.startswith(b"5") for status in statuses), statuses
            body = b'{"messages": [{"role": "user", "content": "hi"}]}'
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {KEY}"
            asked = (
                f"{head}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            async with asyncio.timeout(WAIT_S):
                assert (await send(port, asked, is_whole=True)).startswith(b"HTTP/1.1 200")
            await control.close()
            process.stdin.close()
            assert await asyncio.wait_for(process.wait(), WAIT_S) == 0
            assert b"Traceback" not in await errors

    asyncio.run(work())
