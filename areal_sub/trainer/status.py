"""What the trainer says of itself to `areal-sub status`, from a thread of its own: so it is told
while its event loop stands still, or the learner computes, too.

The thread serves `rpc`'s own `status` beside the sockets of the other processes (`SOCKET_NAME`);
where those lie is written to the run's folder. Called by `wiring`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from areal_sub.rpc import Server

SOCKET_NAME = "trainer.sock"
JOIN_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What a run is asked for, and where its sockets' folder is written down."""

    describe: Callable[[], dict[str, Any]]
    noted: Path


@contextmanager
def status_served(folder: Path, describe: Callable[[], dict[str, Any]]) -> Iterator[None]:
    """While the block runs. `describe` is called in the thread, and must not wait.

    Not to be entered while other threads of ours make files: `Server` sets the umask for a moment.
    """
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    ending = asyncio.Event()

    async def serve() -> None:
        server = Server(folder / SOCKET_NAME, {}, describe=describe)
        await server.start()
        ready.set()
        await ending.wait()
        await server.close()

    thread = threading.Thread(
        target=lambda: loop.run_until_complete(serve()), name="status", daemon=True
    )
    thread.start()
    ready.wait(JOIN_S)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(ending.set)
        thread.join(JOIN_S)
        if not thread.is_alive():
            loop.close()
