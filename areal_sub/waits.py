"""Who waits for whom, in this process, right now.

Every wait between processes, and every long one within this one, goes through `within`: it has a
name and a limit, and stands in the table that `areal-sub status` shows (`waits`). The table may be
read from any thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from areal_sub.errors import DeadlineExceeded

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class waiting:
    """In the table for as long as the block runs; keeping the limit is the block's own."""

    what: str  # whom for, and what it should do
    limit_s: float
    about: str = ""  # or whose work it is: a rollout's id
    since: float = 0.0  # time.monotonic()

    def __enter__(self) -> None:
        self.since = time.monotonic()
        _waits[self] = None

    def __exit__(self, *error: object) -> None:
        del _waits[self]

    def to_map(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "about": self.about,
            "age_s": time.monotonic() - self.since,
            "limit_s": self.limit_s,
        }


_waits: dict[waiting, None] = {}


def waits() -> list[waiting]:
    """What is waited for now, longest first."""
    return list(_waits)


async def within(limit_s: float, work: Awaitable[T], what: str) -> T:
    """`work`'s result. Raises `DeadlineExceeded`, having cancelled it: `what` was not done."""
    with waiting(what, limit_s):
        try:
            async with asyncio.timeout(limit_s) as timeout:
                return await work
        except TimeoutError:
            if not timeout.expired():
                raise  # its own
            raise DeadlineExceeded(f"{what} was not done within {limit_s:g} s") from None


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """`work`'s result, to its end: a cancellation that comes in the middle is raised after it.

    For what must not be left half done, and has a deadline of its own.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        await asyncio.gather(task, return_exceptions=True)  # whatever it raised was looked at
        raise cancelled
    return task.result()
