"""Children that stand sealed and ready before they are asked for.

A burst of runs comes first: the reserve is filled again when no run has begun for a moment, one
child after the other, and no further once one does.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Awaitable, Callable

from .errors import StepFailed
from .run import Run

REFILL_PAUSE_S = 0.1
"""Without a new run, until the reserve is filled again: that takes nothing from a burst."""


class Reserve:
    """Of one zygote."""

    def __init__(self, new: Callable[[], Awaitable[Run]], release: Callable[[Run], None]) -> None:
        """Of none yet. `new`: orders a child. `release`: takes one that is of no use."""
        self._num = 0
        self._new = new
        self._release = release
        self._standing: collections.deque[Run] = collections.deque()
        self._filling: asyncio.Task[None] | None = None
        self._fill_at: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Those that stand ready, the one that is being sealed among them."""
        return len(self._standing)

    def take(self) -> Run | None:
        while self._standing:
            run = self._standing.popleft()
            if run.can_be_asked:
                return run
            self._release(run)
        return None

    def begin(self, num: int) -> None:
        """From now on `num` are to stand ready."""
        self._num = num
        self._fill()

    def fill_later(self) -> None:
        """A run begins: whoever fills the reserve leaves it to the last one."""
        if self._num:
            if self._fill_at is not None:
                self._fill_at.cancel()
            self._fill_at = asyncio.get_running_loop().call_later(REFILL_PAUSE_S, self._fill)

    def _fill(self) -> None:
        self._fill_at = None
        if self._filling is None or self._filling.done():
            self._filling = asyncio.ensure_future(self._fill_up())

    async def _fill_up(self) -> None:
        while self._fill_at is None and len(self) < self._num:
            try:
                run = await self._new()
            except StepFailed:
                return  # what is wrong shows where a child is needed
            if not self._num:  # closed meanwhile
                self._release(run)
                return
            self._standing.append(run)
            await run.ready()
            if not run.is_usable:  # likewise
                return

    def close(self) -> None:
        self._num = 0
        while self._standing:
            self._release(self._standing.popleft())
