"""The proxy process: its two listening sockets, from the settings to the end.

Started by the trainer as `python -m areal_sub.proxy SETTINGS.json` (`areal_sub.component`).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from areal_sub.engine_client import EngineClient
from areal_sub.proxy.app import make_app
from areal_sub.proxy.connection import BoundedHttpProtocol, Connections, num_connections
from areal_sub.proxy.control import Control
from areal_sub.proxy.listeners import Listeners
from areal_sub.proxy.lost import end_lost
from areal_sub.proxy.render import Renderer
from areal_sub.proxy.sessions import Sessions
from areal_sub.proxy.turns import Turns
from areal_sub.rpc import Server
from areal_sub.trajectory.journal import Journal, JournalPolicy

log = logging.getLogger(__name__)

ENGINE_TIMEOUT_S = 600.0  # to come up: it may be loading a large model
# SDKs keep idle connections for minutes and see a reset if we close them first.
KEEP_ALIVE_S = 600
SHUTDOWN_TIMEOUT_S = 1
BACKLOG = 2048
NUM_YOUNG_OBJECTS = 50_000  # between two collections


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the trainer writes into the settings file."""

    agent_host: str
    agent_port: int  # 0: any free one; `info` says which
    control_path: str
    listeners_path: str
    engine_path: str
    journal_path: str
    tokenizer_path: str
    chat_template: str | None
    tool_call_parser: str
    reasoning_parser: str
    request_timeout_s: float
    journal: dict[str, Any] = field(default_factory=dict)  # `JournalPolicy`


async def main(settings: dict[str, Any]) -> None:
    async with serving(Settings(**settings)) as agents:
        _collect_seldom()
        await asyncio.shield(agents)  # our cancellation is not its own: leaving stops it in order


def _collect_seldom() -> None:
    """Python's garbage collector, by its default, looks at all that is in flight every few model
    calls, which is a tenth of the process's time and more. Little of ours lies in cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(NUM_YOUNG_OBJECTS)


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[asyncio.Task[None]]:
    """Both planes up, until left; yields the agent plane's task, which ends only by failing.

    Raises `ModelError`, `ConfigError`, `RecordError`, `DeadlineExceeded` where it cannot start.
    """
    renderer = Renderer.load(
        Path(settings.tokenizer_path),
        Path(settings.chat_template) if settings.chat_template else None,
        settings.tool_call_parser,
        settings.reasoning_parser,
    )
    log.info("answers are read as %s", renderer.format.name)
    async with contextlib.AsyncExitStack() as cleanup:
        journal = Journal(Path(settings.journal_path), JournalPolicy(**settings.journal))
        cleanup.callback(journal.close)
        lost = end_lost(journal)
        if lost:
            log.warning("%d rollouts of an earlier process are lost", len(lost))
        engine = await EngineClient.connect(
            Path(settings.engine_path), timeout_s=ENGINE_TIMEOUT_S, redials=True
        )
        cleanup.push_async_callback(engine.close)
        max_model_len = (await engine.info(timeout_s=ENGINE_TIMEOUT_S)).max_model_len
        sessions = Sessions(lost)
        turns = Turns(
            engine=engine,
            renderer=renderer,
            journal=journal,
            max_model_len=max_model_len,
            request_timeout_s=settings.request_timeout_s,
        )
        listener = _listen(settings.agent_host, settings.agent_port)
        num_each = num_connections() // 2  # the port's, and the listeners' together
        agents = AgentServer(make_app(sessions, turns))
        serving_agents = asyncio.ensure_future(agents.serve(sockets=[]))
        cleanup.push_async_callback(agents.stop, serving_agents)
        among = Connections("the port that all share", lambda: num_each)
        accepting = asyncio.ensure_future(among.accept(listener, partial(agents.protocol, {})))
        cleanup.callback(accepting.cancel)
        listeners = Listeners(
            Path(settings.listeners_path), agents.protocol, sessions.is_open, num_each
        )
        cleanup.push_async_callback(listeners.close)
        # Last in, first out: what runs is stopped and recorded before anything else goes.
        cleanup.push_async_callback(sessions.close_all)
        control = Control(
            sessions=sessions,
            turns=turns,
            journal=journal,
            listeners=listeners,
            agent_port=listener.getsockname()[1],
            max_model_len=max_model_len,
        )
        control_server = Server(Path(settings.control_path), control.handlers())
        await control_server.start()
        cleanup.push_async_callback(control_server.close)
        yield serving_agents


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.create_server((host, port), backlog=BACKLOG)
    listener.setblocking(False)
    return listener


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Not that something was no HTTP: it was answered, and agents could fill the disk with it."""
    return record.msg != "Invalid HTTP request received."


class AgentServer(uvicorn.Server):
    def __init__(self, app: Any) -> None:
        logging.getLogger("uvicorn.error").addFilter(_is_worth_a_line)
        super().__init__(
            uvicorn.Config(
                app,
                http=BoundedHttpProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_S,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the component's (`areal_sub.component`), not uvicorn's."""
        yield

    def protocol(self, state: dict[str, Any], among: Connections) -> asyncio.Protocol:
        """A connection's, whose requests carry `state`."""
        return BoundedHttpProtocol(
            config=self.config, server_state=self.server_state, app_state=state, among=among
        )

    async def stop(self, serving: asyncio.Task[None]) -> None:
        self.should_exit = True
        await asyncio.gather(serving, return_exceptions=True)
