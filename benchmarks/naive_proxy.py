"""The proxy that one writes first: FastAPI, pydantic models, httpx. `python -m ... UPSTREAM`.

Passes chat completions on and keeps what went by, so that the benchmark of our proxy has a
neighbour that does the least. Prints its port.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel


class Message(BaseModel):
    role: str
    content: str | None = None


class Request(BaseModel):
    model: str
    messages: list[Message]
    stream: bool = False


class Choice(BaseModel):
    index: int
    message: Message
    finish_reason: str | None = None


class Completion(BaseModel):
    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: dict[str, int]


def make_app(upstream: str) -> FastAPI:
    app = FastAPI()
    client = httpx.AsyncClient(
        base_url=upstream, timeout=60.0, limits=httpx.Limits(max_connections=None)
    )
    kept: list[Any] = []

    @app.post("/v1/chat/completions")
    async def completions(request: Request) -> Any:
        if request.stream:
            return StreamingResponse(relay(request), media_type="text/event-stream")
        answer = await client.post("/v1/chat/completions", json=request.model_dump())
        completion = Completion.model_validate(answer.json())
        kept[:] = [request, completion]
        return completion

    async def relay(request: Request) -> AsyncIterator[bytes]:
        text = ""
        body = request.model_dump()
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    delta = json.loads(line[6:])["choices"][0]["delta"]
                    text += delta.get("content") or ""
                if line:
                    yield line.encode() + b"\n\n"
        kept[:] = [request, text]

    return app


if __name__ == "__main__":
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(make_app(sys.argv[1]), log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])
