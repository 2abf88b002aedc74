"""An "OpenAI" that answers every chat completion at once: what is left is the cost of the caller.

Raw asyncio, in a process of its own (`python -m benchmarks.stub DOOR`): it prints its port, and
serves there, and at the listeners that come by the Unix socket DOOR as they come to the proxy,
until its standard input ends. HTTP/1.1 with keep-alive and `Content-Length` bodies, no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from areal_sub.proxy.connection import Connections
from areal_sub.proxy.listeners import Listeners

ANSWER = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": "default",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "4"},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": {"prompt_tokens": 12, "completion_tokens": 1, "total_tokens": 13},
    }
).encode()
RESPONSE = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(ANSWER)
) + ANSWER


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection, until the client closes it."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            _, _, after = head.partition(b"content-length:")
            await reader.readexactly(int(after.split(b"\r\n", 1)[0] or 0))
            writer.write(RESPONSE)
            await writer.drain()
    writer.close()


async def main() -> None:
    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def make_protocol(state: dict[str, Any], among: Connections) -> asyncio.Protocol:
        return asyncio.StreamReaderProtocol(asyncio.StreamReader(), answer)

    listeners = Listeners(Path(sys.argv[1]), make_protocol, lambda rollout_id: True, 10_000)
    print(server.sockets[0].getsockname()[1], flush=True)
    loop.add_reader(0, lambda: None if os.read(0, 1024) else ended.set())
    await ended.wait()
    server.close()
    await listeners.close()


if __name__ == "__main__":
    asyncio.run(main())
