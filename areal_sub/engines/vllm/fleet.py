"""The servers: which are ready, which weights they have, and what happens when one dies.

Invariants: a server is ready only with the current weights in it and their version named; loading
weights and bringing a server back take turns, under one lock; the file of the current weights is
kept under a name of our own until the next one is in force.

With adapters (`VllmSettings.lora_rank`) no weights are loaded: each version is an adapter beside
the base (`adapters`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from areal_sub.engines.vllm import update
from areal_sub.engines.vllm.adapters import Adapters
from areal_sub.engines.vllm.api import Api, Refused, ServerGone
from areal_sub.engines.vllm.member import Member
from areal_sub.engines.vllm.probe import Lora, WeightPath, probe
from areal_sub.engines.vllm.process import VllmProcess
from areal_sub.engines.vllm.routing import Routes
from areal_sub.engines.vllm.settings import ModelFacts, VllmSettings
from areal_sub.engines.vllm.weights_file import Probe, check_update, linear_names, shapes_of
from areal_sub.errors import ComponentDied, DeadlineExceeded, ModelError

log = logging.getLogger(__name__)

HEALTH_INTERVAL_S = 5.0
START_POLL_S = 0.5


class Fleet:
    """Use as `async with Fleet(...).running()`; `watch()` raises what nothing can be done about."""

    def __init__(self, settings: VllmSettings, facts: ModelFacts) -> None:
        self._settings = settings
        self._facts = facts
        self._socket = settings.socket_path.with_suffix(".vllm")
        apis = [Api.at_url(url) for url in settings.urls]
        if not apis:
            apis = [Api.at_socket("a server of our own", self._socket)]
        self.members = [Member(i, api) for i, api in enumerate(apis)]
        self.version = settings.policy_version
        self._weights: Path = settings.model_path  # those of `version`: a folder, then a file
        self._shapes = shapes_of(settings.model_path)
        self._lora: Lora | None = None
        self._adapters: Adapters | None = None
        if (rank := settings.lora_rank) is not None:
            self._lora = Lora(rank=rank, targets=linear_names(self._shapes))
            self._adapters = Adapters(
                self._shapes,
                rank=rank,
                owner=settings.socket_path.parent.name,
                timeout_s=self._limit,
            )
        self._routes = Routes()
        self._paused = False
        self._lock = asyncio.Lock()
        self._changed = asyncio.Event()  # set, and replaced, when a server becomes ready
        self._keepers: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Fleet]:
        """All servers ready. Raises `ConfigError`, `ModelError`, `ComponentDied`."""
        try:
            await asyncio.gather(*(self._bring_up(member) for member in self.members))
            self._keepers = [asyncio.ensure_future(self._keep(m)) for m in self.members]
            yield self
        finally:
            for keeper in self._keepers:
                keeper.cancel()
            await asyncio.gather(*self._keepers, return_exceptions=True)
            for member in self.members:
                if member.process is not None:
                    await member.process.stop()
                elif self._adapters is not None:
                    await self._adapters.leave(member)
                member.forget_sender()
                await member.api.close()
            self._drop(self._weights)
            if self._adapters is not None:
                self._adapters.close()

    async def watch(self) -> None:
        """Until a server cannot be brought back."""
        await asyncio.gather(*self._keepers)

    async def pick(self, affinity: str) -> Member:
        """A ready server; waits for one, the deadline is the caller's."""
        while True:
            ready = {m.index: m.num_running for m in self.members if m.ready}
            if ready:
                return self.members[self._routes.choose(affinity, ready)]
            await self._changed.wait()

    async def look_at(self, member: Member) -> None:
        """After an error there: returns once it is known to be well, or no longer ready."""
        if member.ready and not await member.is_healthy():
            member.ready = False
        member.suspect.set()

    async def pause(self) -> None:
        async with self._lock:
            self._paused = True
            await self._on_all(
                self._ready(), lambda m: update.pause(m.api, m.can, timeout_s=self._limit)
            )

    async def resume(self) -> None:
        async with self._lock:
            self._paused = False
            await self._on_all(
                self._ready(), lambda m: update.resume(m.api, m.can, timeout_s=self._limit)
            )

    async def update(self, path: Path, version: int) -> None:
        """Put the weights of `path` into all servers. Raises `ModelError`, `DeadlineExceeded`."""
        limit_s = self._settings.update_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await self._update(path, version)
        except TimeoutError:
            raise DeadlineExceeded(
                f"vLLM did not take the weights of version {version} within {limit_s:.0f} s "
                "(engine.vllm.update_timeout_s)"
            ) from None

    async def _update(self, path: Path, version: int) -> None:
        async with self._lock:
            if type(version) is not int or version <= self.version:
                raise ModelError(
                    f"update_weights to version {version!r}: the engine is at {self.version}, and "
                    "versions must grow with each update"
                )
            if self._adapters is not None:
                await self._update_adapter(self._adapters, path, version)
                return
            check_update(path, self._shapes, tied=self._facts.tied)
            kept = _keep_file(path, self._settings.socket_path)
            old = (self._weights, self.version)
            # From here on, a server that comes back gets the new ones.
            self._weights, self.version = kept, version
            members = self._ready()
            limit = self._limit
            members = await self._on_all(
                members, lambda m: update.pause(m.api, m.can, timeout_s=limit)
            )
            try:
                members = await self._on_all(members, lambda m: self._load(m, kept, version))
            except Refused as error:
                # What has begun to load is neither the old policy nor the new one.
                self._weights, self.version = old
                self._drop(kept)
                for member in members:
                    self._lose(member)
                raise ModelError(
                    f"the weights of version {version} were refused: {error}"
                ) from None
            self._drop(old[0])
            for member in members:
                member.version = version
            if not self._paused:
                members = await self._on_all(
                    members, lambda m: update.resume(m.api, m.can, timeout_s=limit)
                )
                await self._on_all(members, self._verify)

    async def _load(self, member: Member, path: Path, version: int) -> None:
        limit = self._limit
        if member.can.broadcasts and member.sender is None:
            # torch is large, and needed for this alone.
            from areal_sub.engines.vllm.broadcast import Sender

            member.sender = Sender(
                member.can.broadcasts,
                member.api.host,
                num_workers=member.can.num_workers,
                timeout_s=limit,
            )
        try:
            await update.load(
                member.api, member.can, path, version, sender=member.sender, timeout_s=limit
            )
        except BaseException:
            member.forget_sender()  # its group may be broken
            raise

    async def _update_adapter(self, adapters: Adapters, path: Path, version: int) -> None:
        adapters.keep(path, version)
        # From here on, a server that comes back gets the new one.
        old, self.version = self.version, version
        try:
            members = await self._on_all(self._ready(), lambda m: adapters.load(m, version))
            if not self._paused:
                members = await self._on_all(members, self._verify_adapter)
        except (Refused, ModelError) as error:
            self.version = old
            await self._on_all(self._ready(), lambda m: adapters.unload(m, [version]))
            adapters.drop_unused(self.members, old)
            raise ModelError(f"the adapter of version {version} was refused: {error}") from None
        for member in members:
            member.version = version
        await self._on_all(members, lambda m: adapters.unload(m, m.done_with()))
        adapters.drop_unused(self.members, version)

    async def _verify_adapter(self, member: Member) -> None:
        assert self._adapters is not None
        if (file := self._adapters.file_of(self.version)) is not None:
            await self._compare(member, file, member.adapters[self.version])

    async def _verify(self, member: Member) -> None:
        served = await update.served_version(member.api, member.can, timeout_s=self._limit)
        if served != str(self.version):
            raise ModelError(
                f"{member.api} says that its weights are of version {served!r}, not "
                f"{self.version}: does someone else update it?"
            )
        if self._weights.is_file():
            await self._compare(member, self._weights, member.can.model)

    async def _compare(self, member: Member, path: Path, model: str) -> None:
        """What the server computes as `model`, with what the learner said in `path`."""
        said = Probe.read(path)
        if said is not None:
            difference = await update.verify(
                member.api, member.can, said, self.version, model=model, timeout_s=self._limit
            )
            log.info("policy version %d verified: mean |Δ| %.2g", self.version, difference)

    @property
    def _limit(self) -> float:
        return self._settings.update_timeout_s / 4

    def _ready(self) -> list[Member]:
        return [member for member in self.members if member.ready]

    async def _on_all(
        self, members: list[Member], step: Callable[[Member], Coroutine[Any, Any, None]]
    ) -> list[Member]:
        """Take `step` on all of them; those that are left. A server that died meanwhile, or of our
        own that hangs, is given to its keeper. Raises other errors, once all have answered."""
        results = await asyncio.gather(*(step(m) for m in members), return_exceptions=True)
        left, errors = [], []
        for member, result in zip(members, results, strict=True):
            lost = isinstance(result, ServerGone) or (
                isinstance(result, DeadlineExceeded) and member.process is not None
            )
            if lost:
                log.warning("%s", result)
                self._lose(member)
            elif isinstance(result, BaseException):
                errors.append(result)
            else:
                left.append(member)
        if errors:
            raise errors[0]
        return left

    def _lose(self, member: Member) -> None:
        member.ready = False
        if member.process is not None:
            member.process.kill()
        member.suspect.set()

    async def _keep(self, member: Member) -> None:
        """Bring `member` back, each time that it is down."""
        num_restarts = 0
        while True:
            await self._until_down(member)
            member.ready = False
            if member.process is not None:
                await member.process.stop()
                num_restarts += 1
                if num_restarts > self._settings.max_restarts:
                    raise ComponentDied(
                        f"vLLM has ended {num_restarts} times, and is not started again: why, it "
                        "says above"
                    )
            log.warning("%s is down; bringing it back", member.api)
            try:
                await self._bring_up(member)
            except (ServerGone, DeadlineExceeded) as error:
                if member.process is None:
                    raise
                log.warning("%s", error)  # and once more, while it may be restarted

    async def _until_down(self, member: Member) -> None:
        ended = [member.process.ended] if member.process is not None else []
        while True:
            suspect = asyncio.ensure_future(member.suspect.wait())
            await asyncio.wait(
                [suspect, *ended], timeout=HEALTH_INTERVAL_S, return_when=asyncio.FIRST_COMPLETED
            )
            suspect.cancel()
            member.suspect.clear()
            if not member.ready or any(task.done() for task in ended):
                return
            if not await member.is_healthy():
                return

    async def _bring_up(self, member: Member) -> None:
        """Start it, or wait for it; probe it; give it the current weights; make it ready."""
        settings = self._settings
        if settings.python is not None:
            self._socket.unlink(missing_ok=True)
            member.process = await VllmProcess.start(settings, self._facts, self._socket)
            member.adapters.clear()
        await self._until_up(member)
        member.abilities = await probe(
            member.api,
            max_model_len=self._facts.max_model_len,
            lora=self._lora,
        )
        log.info("%s: %s", member.api, member.abilities)
        if member.can.weight_path is WeightPath.RELOAD:
            log.warning(
                "vLLM at %s runs without areal-sub's weight-transfer backend: its own "
                "reload_weights is used (docs/vllm.md)",
                member.api.name,
            )
        async with self._lock:
            if self._adapters is not None:
                await self._give_adapter(self._adapters, member)
            else:
                await self._give_weights(member)
            if self._paused:
                await update.pause(member.api, member.can, timeout_s=self._limit)
            member.suspect.clear()
            member.ready = True
        self._changed.set()
        self._changed = asyncio.Event()

    async def _give_adapter(self, adapters: Adapters, member: Member) -> None:
        """Its base is not touched: that it is the model folder's, each adapter's check shows."""
        await update.resume(member.api, member.can, timeout_s=self._limit)
        await adapters.load(member, self.version)
        await self._verify_adapter(member)
        member.version = self.version

    async def _give_weights(self, member: Member) -> None:
        limit = self._limit
        await update.pause(member.api, member.can, timeout_s=limit)
        # A server that ran before us has weights that we know nothing of.
        if member.process is None or self._weights != self._settings.model_path:
            await self._load(member, self._weights, self.version)
        else:
            await update.name_version(member.api, self.version, timeout_s=limit)
        member.version = self.version
        await update.resume(member.api, member.can, timeout_s=limit)
        await self._verify(member)

    async def _until_up(self, member: Member) -> None:
        """Raises `ComponentDied`, `DeadlineExceeded`. A server that is not ours has to be there at
        the start; later it may take its time to come back."""
        if member.process is None and member.abilities is None:
            return
        timeout_s = self._settings.start_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                while not await member.is_healthy():
                    if member.process is not None and member.process.ended.done():
                        raise ComponentDied(
                            f"vLLM ended with exit code {member.process.ended.result()} before it "
                            "served; why, it says above"
                        )
                    await asyncio.sleep(START_POLL_S)
        except TimeoutError:
            raise DeadlineExceeded(
                f"{member.api} did not serve within {timeout_s:.0f} s (engine.vllm.start_timeout_s)"
            ) from None

    def _drop(self, weights: Path) -> None:
        if weights != self._settings.model_path:
            weights.unlink(missing_ok=True)


def _keep_file(path: Path, socket: Path) -> Path:
    """A second name for it, beside it: the trainer removes its own."""
    kept = path.with_name(f".{socket.parent.name}-{path.name}")
    kept.unlink(missing_ok=True)
    try:
        os.link(path, kept)
    except OSError:
        shutil.copyfile(path, kept)
    return kept
