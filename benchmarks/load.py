"""A load of chat completions over kept-alive connections: `python -m benchmarks.load JSON`.

Raw asyncio, so that two cores are left to what is measured. The JSON says `port`, `num`, `at_once`,
`stream` and `keys`, of which each serves `per_key` requests in turn. Prints JSON: latencies in ms.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import sys
import time
from typing import Any

SYSTEM = "You are a careful assistant. Think about what is asked, then answer in few words. " * 4
QUESTION = "Which of these numbers is the largest, and why: 17, 39, 4, 256, 100, 31? " * 4


def request(key: str, number: int, *, stream: bool) -> bytes:
    body = json.dumps(
        {
            "model": "policy",
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": f"{QUESTION} ({number})"},
            ],
            "stream": stream,
        }
    ).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        "Content-Type: application/json\r\n"
        f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def read_answer(reader: asyncio.StreamReader) -> float:
    """Reads one answer; returns when its first byte came. Raises `SystemExit` for any but 200."""
    head = await reader.readuntil(b"\r\n\r\n")
    first_at = time.perf_counter()
    lower = head.lower()
    if b"content-length:" in lower:
        length = int(lower.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        body = await reader.readexactly(length)
    else:
        body = b""
        while (size := int(await reader.readuntil(b"\r\n"), 16)) > 0:
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
    if not head.startswith(b"HTTP/1.1 200") or (b"data: " in body and b"[DONE]" not in body):
        raise SystemExit(f"a request failed: {head.decode()} {body.decode()}")
    return first_at


async def run(load: dict[str, Any]) -> dict[str, float]:
    numbers = iter(range(load["num"]))
    keys = itertools.chain.from_iterable([key] * load["per_key"] for key in load["keys"])
    whole_s: list[float] = []
    first_s: list[float] = []

    async def worker() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", load["port"], limit=2**24)
        for number in numbers:
            sent_at = time.perf_counter()
            writer.write(request(next(keys), number, stream=load["stream"]))
            first_at = await read_answer(reader)
            whole_s.append(time.perf_counter() - sent_at)
            first_s.append(first_at - sent_at)
        writer.close()

    started_at = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(load["at_once"])))
    return {
        "wall_s": time.perf_counter() - started_at,
        "p50_ms": 1000 * statistics.median(whole_s),
        "first_ms": 1000 * statistics.median(first_s),
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(json.loads(sys.argv[1])))))
