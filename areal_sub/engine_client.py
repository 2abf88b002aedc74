"""The engine contract as its callers see it: tokens in, tokens out, with pause / update / resume.

The proxy samples through it, the trainer updates weights through it. The far side is a process that
serves the same methods over `rpc` (`areal_sub/engines/`); which engine it is, callers never ask.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from areal_sub.errors import GrammarError, RpcError
from areal_sub.records import EngineInfo, GenerateChunk, GenerateRequest
from areal_sub.rpc import Client, Last


class EngineClient:
    """One connection to an engine. Raises `RpcError`, `PeerGone`, `DeadlineExceeded`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @classmethod
    async def connect(cls, path: Path, *, timeout_s: float, redials: bool = False) -> EngineClient:
        client = await Client.connect(path, peer="engine", timeout_s=timeout_s, redials=redials)
        return cls(client)

    async def close(self) -> None:
        await self._client.close()

    @property
    def is_connected(self) -> bool:
        """False while there is no process to call, or none was called yet."""
        return self._client.is_connected

    async def info(self, *, timeout_s: float = 30.0) -> EngineInfo:
        return EngineInfo.from_map(await self._client.call("info", timeout_s=timeout_s))

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        """Chunks until one has a `finish_reason`. Closing the iterator aborts the request.

        The deadline is the caller's (`asyncio.timeout` around the iteration). Raises `GrammarError`
        before the first chunk where the output cannot be held to `request.grammar`.
        """
        try:
            async with aclosing(self._client.stream("generate", request.to_map())) as items:
                async for item in items:
                    yield GenerateChunk.from_map(item)
        except RpcError as error:
            if error.kind == GrammarError.__name__:
                raise GrammarError(error.text) from None
            raise

    async def update_weights(self, path: Path, version: int, *, timeout_s: float) -> None:
        """Load the safetensors file at `path` between two decode steps; requests go on running."""
        params = {"path": str(path), "version": version}
        await self._client.call("update_weights", params, timeout_s=timeout_s)

    async def pause(self, *, timeout_s: float = 30.0) -> None:
        """Stop decoding after the current step; requests are kept."""
        await self._client.call("pause", timeout_s=timeout_s)

    async def resume(self, *, timeout_s: float = 30.0) -> None:
        await self._client.call("resume", timeout_s=timeout_s)


def item_of(chunk: GenerateChunk) -> Any:
    """What an engine's handler of `generate` yields for `chunk`."""
    item = chunk.to_map()
    return item if chunk.finish_reason is None else Last(item)
