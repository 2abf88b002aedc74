"""A zygote that is always there: replaced after so many children, and when it has died.

Its successor is started while it goes on to serve; children begin in the successor once that is
warm, and the old one is closed when its last child has ended. So renewal neither delays nor ends
any child. Called by whoever runs many children of one agent; all methods in one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from .errors import SandboxError
from .handle import Zygote

log = logging.getLogger(__name__)


class _Generation:
    """One zygote and its children."""

    def __init__(self, zygote: Zygote) -> None:
        self.zygote = zygote
        self.num_begun = 0
        self.num_running = 0
        self.is_retired = False


class RenewedZygote:
    """Zygotes that `start` makes, one after the other."""

    def __init__(
        self, start: Callable[[], Awaitable[Zygote]], *, renew_after: int, label: str = ""
    ) -> None:
        """`renew_after`: children of each zygote. `label` names it in the log."""
        self._start = start
        self._renew_after = renew_after
        self._label = label
        self._current: _Generation | None = None
        self._starting: asyncio.Task[_Generation] | None = None
        self._renewing: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._retired: set[_Generation] = set()
        self.num_started = 0
        self.num_renewed = 0

    @property
    def is_alive(self) -> bool:
        return self._current is not None and self._current.zygote.is_alive

    @property
    def num_standing(self) -> int:
        """Children that stand ready."""
        return self._current.zygote.num_standing if self._current is not None else 0

    @property
    def is_starting(self) -> bool:
        """A zygote is being started, whose `pids` are not known yet."""
        return any(
            task is not None and not task.done() for task in (self._starting, self._renewing)
        )

    @property
    def pids(self) -> set[int]:
        """The children of this process that belong to its living zygotes."""
        generations = [*self._retired, *([self._current] if self._current is not None else [])]
        return {pid for each in generations if each.zygote.is_alive for pid in each.zygote.pids}

    async def started(self) -> None:
        """Returns when what is being started is ready, or has failed."""
        tasks = {task for task in (self._starting, self._renewing) if task is not None}
        if tasks:
            await asyncio.wait(tasks)

    async def warm(self) -> Zygote:
        """The zygote, started where there is none. Raises `SandboxError`."""
        return (await self._generation()).zygote

    @contextlib.asynccontextmanager
    async def lend(self) -> AsyncIterator[Zygote]:
        """The zygote, for one child. Raises `SandboxError`."""
        generation = await self._generation()
        while generation.is_retired:  # meanwhile
            generation = await self._generation()
        generation.num_begun += 1
        generation.num_running += 1
        if generation.num_begun >= self._renew_after and self._renewing is None:
            self._renewing = asyncio.ensure_future(self._renew(generation))
        try:
            yield generation.zygote
        finally:
            generation.num_running -= 1
            self._close_if_idle(generation)

    async def close(self) -> None:
        """End every zygote, and with it every child."""
        tasks = [task for task in (self._starting, self._renewing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        generations = [*self._retired, *([self._current] if self._current is not None else [])]
        await asyncio.gather(*(each.zygote.close() for each in generations))
        await asyncio.gather(*self._closing, return_exceptions=True)

    async def _generation(self) -> _Generation:
        if self._current is not None and self._current.zygote.is_alive:
            return self._current
        if self._starting is None or self._starting.done():
            self._starting = asyncio.ensure_future(self._begin())
        # Shielded: many may wait for one start, and one that gives up must not end it.
        return await asyncio.shield(self._starting)

    async def _begin(self) -> _Generation:
        self.num_started += 1
        generation = _Generation(await self._start())
        self._current = generation
        return generation

    async def _renew(self, old: _Generation) -> None:
        try:
            self.num_started += 1
            new = _Generation(await self._start())
        except SandboxError as error:
            log.warning("%s: goes on in its old zygote, a new one failed: %s", self._label, error)
            old.num_begun = 0
            return
        finally:
            self._renewing = None
        if self._current is not old:  # it died meanwhile, and was replaced
            self._retire(new)
            return
        self.num_renewed += 1
        self._current = new
        self._retire(old)

    def _retire(self, generation: _Generation) -> None:
        generation.is_retired = True
        self._retired.add(generation)
        self._close_if_idle(generation)

    def _close_if_idle(self, generation: _Generation) -> None:
        if generation in self._retired and generation.num_running == 0:
            task = asyncio.ensure_future(self._close(generation))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _close(self, generation: _Generation) -> None:
        await generation.zygote.close()
        self._retired.discard(generation)
