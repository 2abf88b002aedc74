"""The engine's process: starts or finds vLLM, and serves `engine_client`'s calls.

`info` is answered once all servers are ready; it ends with its trainer, or when a server cannot be
brought back.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from areal_sub.engine_client import item_of
from areal_sub.engines.embedded.grammars import Grammars
from areal_sub.engines.embedded.request import Request
from areal_sub.engines.vllm.calls import Calls
from areal_sub.engines.vllm.fleet import Fleet
from areal_sub.engines.vllm.settings import ModelFacts, VllmSettings
from areal_sub.errors import GrammarError
from areal_sub.records import EngineInfo, GenerateRequest
from areal_sub.rpc import Server


async def serve(data: dict[str, Any]) -> None:
    """Serve until cancelled. `data`: see `VllmSettings`. Raises `ConfigError`, `ModelError`,
    `ComponentDied`."""
    settings = VllmSettings.from_map(data)
    facts = ModelFacts.of(settings)
    async with Fleet(settings, facts).running() as fleet:
        await Engine(settings, facts, fleet).serve()


class Engine:
    def __init__(self, settings: VllmSettings, facts: ModelFacts, fleet: Fleet) -> None:
        self._settings = settings
        self._facts = facts
        self._fleet = fleet
        self._calls = Calls(fleet, max_retries=settings.max_retries)
        self._grammars = Grammars(
            str(settings.model_path),
            vocab_size=facts.vocab_size,
            max_open=sum(member.can.num_slots for member in fleet.members),
        )
        self._ids = itertools.count()

    async def serve(self) -> None:
        server = Server(
            self._settings.socket_path,
            {
                "info": self._info,
                "generate": self._generate,
                "update_weights": self._update_weights,
                "pause": self._pause,
                "resume": self._resume,
            },
        )
        try:
            await server.start()
            await self._fleet.watch()
        finally:
            await server.close()
            self._grammars.close()

    async def _info(self, params: dict[str, Any]) -> dict[str, Any]:
        num_slots = sum(member.can.num_slots for member in self._fleet.members)
        return EngineInfo(
            policy_version=self._fleet.version,
            max_model_len=self._facts.max_model_len,
            vocab_size=self._facts.vocab_size,
            num_slots=num_slots,
            num_running=min(num_slots, self._calls.num_running),
            num_waiting=max(0, self._calls.num_running - num_slots),
            num_generated_tokens=self._calls.num_generated_tokens,
            num_decode_steps=0,  # vLLM does not say
        ).to_map()

    async def _generate(self, params: dict[str, Any]) -> AsyncIterator[Any]:
        record = GenerateRequest.from_map(params)
        request = Request.checked(
            record,
            request_id=next(self._ids),
            vocab_size=self._facts.vocab_size,
            max_model_len=self._facts.max_model_len,
        )
        # Compiled here to know what is wrong with it; the server does it again for itself. Open
        # until the end, so that there are no more at once than the servers can run.
        async with self._held_to(request), aclosing(self._calls.run(request)) as chunks:
            async for chunk in chunks:
                yield item_of(chunk)

    @asynccontextmanager
    async def _held_to(self, request: Request) -> AsyncIterator[None]:
        """Raises `GrammarError` where the output cannot be held to the request's grammar."""
        if not request.grammar:
            yield
            return
        for member in self._fleet.members:
            if member.can.no_grammars:
                raise GrammarError(member.can.no_grammars)
        constraint = await self._grammars.compile(
            request.grammar, stop_token_ids=request.stop_token_ids
        )
        try:
            yield
        finally:
            constraint.close()

    async def _update_weights(self, params: dict[str, Any]) -> None:
        await self._fleet.update(Path(params["path"]), params["version"])

    async def _pause(self, params: dict[str, Any]) -> None:
        await self._fleet.pause()

    async def _resume(self, params: dict[str, Any]) -> None:
        await self._fleet.resume()
