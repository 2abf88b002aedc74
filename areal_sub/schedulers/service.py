"""A component and its life: started, watched, asked whether it still answers, started again, ended.

`Service` is engine, proxy or supervisor over all of its processes. What ends one is noticed by its
exit (at once), or by its silence: a process that answers no `ping` for `heartbeat_s` hangs, and is
killed. Either is an `Incident`, which is told, and then the next process takes its place: `launch`
starts it, `introduce` brings it to where the last one was, and only then does it get the path that
callers know (`rpc`: who redials finds it there). What the callers lost is theirs to ask for again.

Bounded: more than `max_restarts` within `window_s` end the run with a `ComponentDied` that names
the component, how it ended, and the end of its log. A process that dies in its first start ends it
at once: what is wrong then will not mend itself; where it says what (`component.refusal`), that is
the error. Called by `trainer/wiring`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from areal_sub.errors import ArealSubError, ComponentDied, DeadlineExceeded, RpcError
from areal_sub.rpc import Client
from areal_sub.schedulers.local import Component

log = logging.getLogger(__name__)

BEATS = 4
"""Pings per `heartbeat_s`, one after the other."""
SECOND_CHANCE_S = 5.0
"""Where it was this process that stood still, an answer has come by then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a component gets."""

    start_s: float  # to come up
    heartbeat_s: float  # to answer
    shutdown_s: float  # to end
    max_restarts: int
    window_s: float  # that `max_restarts` are counted in


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """A process that ended while it was needed, or that could not take another's place."""

    component: str
    pid: int
    what: str  # one line: how it ended, or what it did not do
    log_tail: str
    noticed_at: float  # Unix time, s
    number: int  # 1, 2, ... of this component
    is_final: bool  # there is no restart left

    def __str__(self) -> str:
        then = "it was the last one allowed" if self.is_final else "starting another"
        return f"the {self.component} (process {self.pid}) {self.what}; {then}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """How one kind of component is started. `number` is 0 for its first process, then 1, 2, ..."""

    launch: Callable[[int], Awaitable[Component]]
    introduce: Callable[[int], Awaitable[None]]
    """Waits until it answers, tells it what it must know, and gives it the path that callers know.
    Its deadline is `Limits.start_s`."""
    look: Callable[[float], Awaitable[None]] | None = None
    """Beside the ping: raises `DeadlineExceeded` where it does not do its work."""


class Service:
    """One component, over all its processes. `start` it, `live` while it is needed, `stop` it."""

    def __init__(
        self,
        name: str,
        steps: Steps,
        client: Client,
        limits: Limits,
        *,
        on_incident: Callable[[Incident], None],
    ) -> None:
        """`client`: redials, to the path that callers know."""
        self.name = name
        self.incidents: list[Incident] = []
        self.is_given_up = False
        self._is_up = False
        self._steps = steps
        self._client = client
        self._limits = limits
        self._on_incident = on_incident
        self._component: Component | None = None
        self._number = 0
        self._recent: deque[float] = deque()  # moments of restarts
        self._accused: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def pid(self) -> int:
        assert self._component is not None
        return self._component.pid

    async def start(self) -> None:
        """The first process begins to come up; `introduced` waits for it."""
        self._component = await self._steps.launch(0)

    async def introduced(self) -> None:
        """The first process can be called. Raises `ComponentDied`, `DeadlineExceeded`, and the
        one of `INPUT_ERRORS` that it refused its settings by."""
        await self._introduce()

    async def live(self) -> NoReturn:
        """Keep it running. Raises `ComponentDied` when it may not be started again."""
        assert self._component is not None
        while True:
            what = await self._end_of(self._component)
            while True:
                await self._bury(what)
                try:
                    self._number += 1
                    self._component = await self._steps.launch(self._number)
                    await self._introduce()
                    break
                except ComponentDied:
                    what = f"{self._component.how_ended} while it came up"
                except (ArealSubError, OSError) as error:
                    what = f"could not take the last one's place ({error})"
            log.info("another %s runs: process %d", self.name, self.pid)

    def accuse(self, what: str) -> None:
        """It does not do its work: kill it, and start another. `what` goes on from its name.

        No effect while another is coming up, which has a limit of its own.
        """
        if self._is_up and not self._accused.done():
            self._accused.set_result(what)

    async def stop(self) -> None:
        """End its process; returns when it is gone."""
        if self._component is not None:
            await self._component.stop(self._limits.shutdown_s)

    async def _introduce(self) -> None:
        """Raises what `Component.died` does as soon as it ends under it."""
        assert self._component is not None
        coming_up = asyncio.ensure_future(self._steps.introduce(self._number))
        died = self._component.died
        try:
            async with asyncio.timeout(self._limits.start_s):
                await asyncio.wait({coming_up, died}, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise DeadlineExceeded(
                f"the {self.name} did not come up within {self._limits.start_s:g} s; "
                f"{self._component.log_end()}"
            ) from None
        finally:
            came_up = coming_up.done()
            coming_up.cancel()
            (failure,) = await asyncio.gather(coming_up, return_exceptions=True)
        if died.done():
            died.result()
        assert came_up
        if failure is not None:
            raise failure
        self._is_up = True

    async def _end_of(self, component: Component) -> str:
        """Waits for the process's end, or for its silence; what happened."""
        beating = asyncio.ensure_future(self._beat())
        accused = self._accused
        try:
            ends: set[asyncio.Future[Any]] = {component.died, beating, accused}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if component.died.done():
                return component.how_ended
            return accused.result() if accused.done() else beating.result()
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)

    async def _beat(self) -> str:
        """Returns when it is silent for too long: what it did not do."""
        limit_s = self._limits.heartbeat_s
        while True:
            await asyncio.sleep(limit_s / BEATS)
            try:
                try:
                    await self._client.call("ping", timeout_s=limit_s)
                except DeadlineExceeded:
                    await self._client.call("ping", timeout_s=min(limit_s, SECOND_CHANCE_S))
                if self._steps.look is not None:
                    await self._steps.look(limit_s)
            except DeadlineExceeded as error:
                return f"hangs: {error}"
            except RpcError:
                continue  # it goes; its exit says more

    async def _bury(self, what: str) -> None:
        """Tell of the end, and see to it. Raises `ComponentDied` where no restart is left."""
        self._is_up = False
        component, now = self._component, time.monotonic()
        assert component is not None
        if self._accused.done():
            self._accused = asyncio.get_running_loop().create_future()
        while self._recent and now - self._recent[0] > self._limits.window_s:
            self._recent.popleft()
        incident = Incident(
            component=self.name,
            pid=component.pid,
            what=what,
            log_tail=component.log_tail(),
            noticed_at=time.time(),
            number=len(self.incidents) + 1,
            is_final=len(self._recent) >= self._limits.max_restarts,
        )
        self.incidents.append(incident)
        self._on_incident(incident)
        await component.kill()
        if incident.is_final:
            self.is_given_up = True
            await self._client.close()  # who would wait for it to come back need not
            allowed = f"{self._limits.max_restarts} restarts in {self._limits.window_s:g} s"
            raise ComponentDied(
                f"the {self.name} process {what} while it was needed, and {allowed} are allowed "
                f"(scheduler.max_restarts); {component.log_end()}"
            )
        self._recent.append(now)
