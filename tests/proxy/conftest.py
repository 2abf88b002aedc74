"""A small real model folder, an engine stub behind a real socket, and the proxy on real ports."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from google import genai
from stub_engine import TEMPLATE, THINKING_TEMPLATE, StubEngine, make_model_folder

from areal_sub.proxy.render import Renderer
from areal_sub.proxy.server import Settings, serving
from areal_sub.proxy.vocabulary import Vocabulary
from areal_sub.records import (
    IntentRecord,
    TrajectoryRecord,
    TurnRecord,
    decode_record,
)
from areal_sub.rpc import Client, Server
from areal_sub.trajectory.journal import read_journal
from areal_sub.trajectory.tree import Trajectory


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def thinking_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("thinking"), THINKING_TEMPLATE)


@pytest.fixture(scope="session")
def vocabulary(model_folder: Path) -> Vocabulary:
    return Vocabulary(model_folder)


@dataclass
class Proxy:
    """A running proxy and what a test needs to talk to it from both sides."""

    engine: StubEngine
    control: Client
    port: int
    journal_path: Path
    engine_server: Server
    ids: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def open(self, **changes: Any) -> Rollout:
        """Open a rollout. `changes`: of its parameters or of its `gconfig`."""
        rollout_id = changes.pop("rollout_id", f"r{next(self.ids)}")
        gconfig = {
            "max_new_tokens": 256,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "override_agent": True,
        }
        gconfig |= {name: changes.pop(name) for name in list(changes) if name in gconfig}
        params = {
            "rollout_id": rollout_id,
            "key": secrets.token_urlsafe(24),
            "group_id": "g0",
            "task_id": "t0",
            "split": "train",
            "policy_version": 0,
            "max_turns": 64,
            "gconfig": gconfig,
        } | changes
        await self.control.call("open_rollout", params, timeout_s=10)
        return Rollout(self, rollout_id, params["key"])

    async def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = await self.control.call("stats", timeout_s=10)
        return stats

    def records(self) -> list[TrajectoryRecord]:
        return [decode_record(raw) for _, raw in read_journal(self.journal_path)]


@dataclass
class Rollout:
    proxy: Proxy
    rollout_id: str
    key: str

    @property
    def base_url(self) -> str:
        return f"{self.proxy.url}/v1"

    def client(self, **changes: Any) -> openai.AsyncOpenAI:
        settings = {"base_url": self.base_url, "api_key": self.key, "max_retries": 0, "timeout": 20}
        return openai.AsyncOpenAI(**{**settings, **changes})

    def anthropic(self, **changes: Any) -> anthropic.AsyncAnthropic:
        settings = {"base_url": self.proxy.url, "api_key": self.key, "max_retries": 0}
        return anthropic.AsyncAnthropic(**{**settings, "timeout": 20, **changes})

    def gemini(self, api_key: str | None = None, **options: Any) -> genai.client.AsyncClient:
        options = {"base_url": self.proxy.url, "timeout": 20_000, **options}
        return genai.Client(api_key=api_key or self.key, http_options=options).aio

    async def end(self, **changes: Any) -> dict[str, Any]:
        params = {
            "rollout_id": self.rollout_id,
            "outcome": "completed",
            "reward": 1.0,
            "turn_rewards": {},
            "error": "",
            "traceback": "",
            "stdout_tail": "",
            "stderr_tail": "",
            "wall_s": 1.0,
            "cpu_s": 0.5,
            "max_rss_bytes": 1000,
            "egress_refused": {},
            "written_bytes": 4096,
            "peak_memory_bytes": 8192,
        } | changes
        ended: dict[str, Any] = await self.proxy.control.call("end_rollout", params, timeout_s=10)
        return ended

    def turns(self) -> list[TurnRecord]:
        return [
            record
            for record in self.proxy.records()
            if isinstance(record, TurnRecord) and record.rollout_id == self.rollout_id
        ]

    def trajectory(self) -> Trajectory:
        opened, *turns, end = [
            record
            for record in self.proxy.records()
            if record.rollout_id == self.rollout_id and not isinstance(record, IntentRecord)
        ]
        return Trajectory.build(opened, turns, end)  # type: ignore[arg-type]


def proxy_settings(folder: Path, engine_path: Path, model: Path, **changes: Any) -> dict[str, Any]:
    return {
        "agent_host": "127.0.0.1",
        "agent_port": 0,
        "control_path": str(folder / "proxy.sock"),
        "listeners_path": str(folder / "listeners.sock"),
        "engine_path": str(engine_path),
        "journal_path": str(folder / "journal.bin"),
        "tokenizer_path": str(model),
        "chat_template": None,
        "tool_call_parser": "auto",
        "reasoning_parser": "none",
        "request_timeout_s": 20.0,
    } | changes


@asynccontextmanager
async def running_engine(folder: Path, model: Path) -> AsyncIterator[tuple[StubEngine, Server]]:
    engine = StubEngine(Vocabulary(model))
    handlers = {"info": engine.info, "generate": engine.generate}
    server = Server(folder / "engine.sock", handlers)
    await server.start()
    try:
        yield engine, server
    finally:
        await server.close()


@asynccontextmanager
async def running_proxy(
    folder: Path, model: Path, max_model_len: int = 4096, **changes: Any
) -> AsyncIterator[Proxy]:
    """The proxy in this process, on real sockets."""
    async with running_engine(folder, model) as (engine, server):
        engine.max_model_len = max_model_len
        settings = proxy_settings(folder, folder / "engine.sock", model, **changes)
        async with running_proxy_of(engine, server, settings) as proxy:
            yield proxy


@asynccontextmanager
async def running_proxy_of(
    engine: Any, server: Any, settings: dict[str, Any]
) -> AsyncIterator[Proxy]:
    async with AsyncExitStack() as cleanup:
        await cleanup.enter_async_context(serving(Settings(**settings)))
        control = await Client.connect(Path(settings["control_path"]), peer="proxy", timeout_s=10)
        cleanup.push_async_callback(control.close)
        port = (await control.call("info", timeout_s=10))["agent_port"]
        yield Proxy(engine, control, port, Path(settings["journal_path"]), server)


@pytest.fixture(scope="module")
def with_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """`with_engine(work, **changes)`: as `proxied`, before a real embedded engine with a random
    model (one for the whole module)."""
    from engine_lab import engine_process
    from grammar_lab import make_folder

    model = tmp_path_factory.mktemp("random")
    make_folder(model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    with engine_process(model, model_path=str(model), max_running_requests=8) as engine:

        def run(work: Callable[[Proxy], Any], **changes: Any) -> Any:
            async def main() -> Any:
                folder = tmp_path_factory.mktemp("proxy")
                settings = proxy_settings(folder, engine.socket_path, model, **changes)
                async with (
                    running_proxy_of(engine, None, settings) as proxy,
                    asyncio.timeout(60),
                ):
                    return await work(proxy)

            return asyncio.run(main())

        yield run


@pytest.fixture
def proxied(tmp_path: Path, model_folder: Path) -> Callable[..., Any]:
    """`proxied(work, **changes)`: run `await work(proxy)` with a proxy of its own."""

    def run(work: Callable[[Proxy], Any], model: Path = model_folder, **changes: Any) -> Any:
        async def main() -> Any:
            async with running_proxy(tmp_path, model, **changes) as proxy, asyncio.timeout(30):
                return await work(proxy)

        return asyncio.run(main())

    return run


@pytest.fixture(scope="session")
def new_stub() -> type[StubEngine]:
    return StubEngine


@pytest.fixture(scope="session")
def renderers(model_folder: Path, thinking_folder: Path) -> dict[str, Any]:
    """One for each template, and one that tells reasoning apart."""
    return {
        "plain": Renderer.load(model_folder),
        "thinking": Renderer.load(thinking_folder),
        "reasoning": Renderer.load(model_folder, reasoning_parser="think"),
    }


@pytest.fixture
def engine_alone(tmp_path: Path, model_folder: Path) -> Callable[..., Any]:
    """An engine stub, and the settings with which a proxy process finds it."""

    @asynccontextmanager
    async def start(**changes: Any) -> AsyncIterator[tuple[StubEngine, dict[str, Any]]]:
        async with running_engine(tmp_path, model_folder) as (engine, _):
            yield (
                engine,
                proxy_settings(tmp_path, tmp_path / "engine.sock", model_folder, **changes),
            )

    return start


@pytest.fixture
def hand_over(tmp_path: Path) -> Callable[[str], int]:
    """Bind a listener and send it to the proxy, as the supervisor does; returns its port."""

    def send(rollout_id: str) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        with listener, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
            door.connect(str(tmp_path / "listeners.sock"))
            socket.send_fds(door, [rollout_id.encode()], [listener.fileno()])
            port: int = listener.getsockname()[1]
            return port

    return send
