"""One server of the fleet: what it can do, what it serves, and whether it is well."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

from areal_sub.engines.vllm.api import Api
from areal_sub.engines.vllm.probe import Abilities, WeightPath
from areal_sub.engines.vllm.process import VllmProcess
from areal_sub.engines.vllm.wire import Way
from areal_sub.errors import ArealSubError

if TYPE_CHECKING:
    from areal_sub.engines.vllm.broadcast import Sender

# A dead server refuses the connection at once; a busy one is not to be killed for being so.
HEALTH_TIMEOUT_S = 60.0


class Member:
    """One server."""

    def __init__(self, index: int, api: Api) -> None:
        self.index = index
        self.api = api
        self.process: VllmProcess | None = None
        self.sender: Sender | None = None  # of weights, to a server that takes them by broadcast
        self.abilities: Abilities | None = None  # None until it has been probed
        self.ready = False
        self.version = -1  # of the tokens that it samples now
        self.num_running = 0
        self.adapters: dict[int, str] = {}  # version → name, of those loaded, first the base's
        self.num_using: Counter[int] = Counter()  # requests, by the version that they began with
        self.suspect = asyncio.Event()  # someone met an error there: look at it now

    @property
    def can(self) -> Abilities:
        assert self.abilities is not None
        return self.abilities

    @property
    def takes_adapters(self) -> bool:
        return self.can.weight_path is WeightPath.ADAPTER

    @property
    def model(self) -> str:
        """The name that requests give now."""
        return self.adapters[self.version] if self.takes_adapters else self.can.model

    def forget_sender(self) -> None:
        if self.sender is not None:
            self.sender.close()
            self.sender = None

    def done_with(self) -> list[int]:
        """Versions of adapters that nothing uses any more."""
        return [v for v in self.adapters if v != self.version and not self.num_using[v]]

    async def is_healthy(self) -> bool:
        # SGLang's /health samples a token, which it does not do while it is paused.
        is_sglang = self.abilities is not None and self.abilities.way is Way.SGLANG
        try:
            path = "/model_info" if is_sglang else "/health"
            await self.api.get(path, timeout_s=HEALTH_TIMEOUT_S)
        except ArealSubError:
            return False
        return True
