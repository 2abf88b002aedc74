"""The models behind the proxies of `benchmarks.proxy`: answers of 64 tokens, at once.

    python -m benchmarks.upstream http            an OpenAI server, as other proxies need
    python -m benchmarks.upstream engine SOCKET   an engine of ours: tokens in, tokens out

Both send a streamed answer token by token, without waiting in between. The first prints its port.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np

from areal_sub.engine_client import item_of
from areal_sub.records import (
    EngineInfo,
    GenerateChunk,
    GenerateRequest,
    extend_digest,
    float32,
    int32,
    uint32,
)
from areal_sub.rpc import Server

NUM_TOKENS = 64
TEXT = "a"
MAX_MODEL_LEN = 2**20


def _chunk(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 0, "model": "policy"}
    return b"data: " + json.dumps({**head, "choices": [choice]}).encode() + b"\n\n"


_EVENTS = [
    _chunk({"role": "assistant", "content": ""}),
    *([_chunk({"content": TEXT})] * NUM_TOKENS),
    _chunk({}, "stop"),
    b"data: [DONE]\n\n",
]
_WHOLE = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": "policy",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": TEXT * NUM_TOKENS},
                "finish_reason": "stop",
                "logprobs": None,
            }
        ],
        "usage": {"prompt_tokens": 9, "completion_tokens": NUM_TOKENS, "total_tokens": 73},
    }
).encode()
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n%b\r\n\r\n"
RESPONSE = _HEAD % (b"application/json", b"Content-Length: %d" % len(_WHOLE)) + _WHOLE
STREAM = [
    _HEAD % (b"text/event-stream", b"Transfer-Encoding: chunked"),
    *(b"%x\r\n%b\r\n" % (len(event), event) for event in _EVENTS),
    b"0\r\n\r\n",
]


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection, until the client closes it."""
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            _, _, after = head.partition(b"content-length:")
            body = await reader.readexactly(int(after.split(b"\r\n", 1)[0] or 0))
            if b'"stream":true' in body.replace(b" ", b""):
                for piece in STREAM:
                    writer.write(piece)
                    await asyncio.sleep(0)
            else:
                writer.write(RESPONSE)
            await writer.drain()
    writer.close()


async def serve_http() -> None:
    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await _until_end_of_input()
    server.close()


class Engine:
    """Answers every request with the same tokens, and a stop token at the end."""

    def __init__(self, token_id: int, stop_id: int) -> None:
        self._token_ids = [token_id] * (NUM_TOKENS - 1) + [stop_id]

    async def info(self, _params: dict[str, Any]) -> dict[str, Any]:
        info = EngineInfo(
            policy_version=0,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=2**15,
            num_slots=0,
            num_running=0,
            num_waiting=0,
            num_generated_tokens=0,
            num_decode_steps=0,
        )
        return info.to_map()

    async def generate(self, params: dict[str, Any]) -> AsyncIterator[Any]:
        request = GenerateRequest.from_map(params)
        digest = extend_digest(0, request.prompt_token_ids)
        digests = []
        for token_id in self._token_ids:
            digest = zlib.crc32(np.int32(token_id).tobytes(), digest)
            digests.append(digest)
        size = 1 if request.stream else NUM_TOKENS
        for start in range(0, NUM_TOKENS, size):
            end = start + size
            chunk = GenerateChunk(
                token_ids=int32(self._token_ids[start:end]),
                logprobs=float32([-0.5] * size),
                versions=int32([0] * size),
                finish_reason="stop" if end == NUM_TOKENS else None,
                digests=uint32(digests[start:end]),
            )
            yield item_of(chunk)
            await asyncio.sleep(0)


async def serve_engine(path: Path, token_id: int, stop_id: int) -> None:
    engine = Engine(token_id, stop_id)
    server = Server(path, {"info": engine.info, "generate": engine.generate})
    await server.start()
    print("ready", flush=True)
    await _until_end_of_input()
    await server.close()


async def _until_end_of_input() -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(0, lambda: None if os.read(0, 1024) else ended.set())
    await ended.wait()


if __name__ == "__main__":
    kind, *words = sys.argv[1:]
    if kind == "http":
        asyncio.run(serve_http())
    else:
        asyncio.run(serve_engine(Path(words[0]), int(words[1]), int(words[2])))
