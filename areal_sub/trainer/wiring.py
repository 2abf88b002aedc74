"""Starts the processes of a run and connects to them: engine, proxy, supervisor.

`async with Stack.start(...)` yields the connections; leaving it ends every process. `Stack.guard`
runs a coroutine for as long as they can be kept running: one that ends is started again
(`schedulers/service`), with what it must know to go on for the last one:

    engine       the weights in force, and their version, before the proxy finds it
    proxy        the port that agents call; in the journal it finds what was open, and ends it
    supervisor   the proxy's port and its door for listeners

Each takes its predecessor's socket over by a rename. Where that fails too often, `guard` raises the
`ComponentDied` that names the process and the end of its log.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from areal_sub.config import Config
from areal_sub.engine_client import EngineClient
from areal_sub.errors import DeadlineExceeded, PeerGone
from areal_sub.learner.weights_file import leave
from areal_sub.records import EngineInfo
from areal_sub.rollout.attempt import AgentRunner, RolloutRunner
from areal_sub.rollout.environ import supervisor_environment
from areal_sub.rollout.grader import Grader
from areal_sub.rollout.inline import InlineRunner
from areal_sub.rollout.mix import Agent
from areal_sub.rollout.pool import SubprocPool
from areal_sub.rpc import Client
from areal_sub.schedulers.local import Component
from areal_sub.schedulers.service import Incident, Limits, Service, Steps
from areal_sub.trainer.scratch import scratch_folder
from areal_sub.trainer.settings import (
    engine_settings,
    proxy_settings,
    supervisor_settings,
)
from areal_sub.trainer.status import Status, status_served
from areal_sub.trajectory.stream import TrajectoryStream

T = TypeVar("T")

_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """The running processes of a run, connected."""

    engine: EngineClient
    engine_info: EngineInfo
    proxy: Client
    proxy_port: int
    stream: TrajectoryStream
    agents: AgentRunner
    sandbox: str  # what children are run in, as a line for the user; "" where there are none
    rollouts: RolloutRunner
    weights_folder: Path  # where weight files for the engine are left; memory-backed if possible
    weights: WeightsInForce
    services: Mapping[str, Service]
    watches: tuple[asyncio.Task[Any], ...]

    async def guard(self, work: Coroutine[Any, Any, T]) -> T:
        """`work`'s result. Raises `ComponentDied` as soon as a process is gone for good."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task, *self.watches}, return_when=asyncio.FIRST_COMPLETED)
            for watch in self.watches:
                if watch.done():
                    watch.result()
            return await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def warm(self, agents: Iterable[Agent]) -> list[str]:
        """Import the agents once, so that one that cannot be imported ends the run before it
        begins. Returns notes for the user; raises `WorkflowError`."""
        wanted: list[dict[str, Any]] = []
        for agent in agents:
            env = self.rollouts.import_env(agent)
            one = {
                name: getattr(agent, name) for name in ("target", "pickled", "python", "readable")
            }
            if (one := {**one, "env": env}) not in wanted:
                wanted.append(one)
        return [note for one in wanted for note in await self.agents.warm(**one)]

    async def update_weights(self, path: Path, version: int, *, timeout_s: float) -> None:
        """The engine samples with the weights in `path` when this returns; the file is ours now.

        An engine that ends under it, or takes longer, is replaced by one that has them.
        """
        earlier, service = self.weights.path, self.services["engine"]
        self.weights.path, self.weights.version = path, version
        while True:
            try:
                if (await self.engine.info(timeout_s=timeout_s)).policy_version >= version:
                    break
                await self.engine.update_weights(path, version, timeout_s=timeout_s)
            except PeerGone:
                if service.is_given_up:
                    raise
            except DeadlineExceeded as error:
                service.accuse(f"hangs: {error}")
        if earlier is not None:
            leave(earlier)

    @classmethod
    @asynccontextmanager
    async def start(
        cls,
        config: Config,
        *,
        model_path: str,
        tokenizer_path: str,
        policy_version: int,
        journal: Path,
        logs: Path,
        logs_stay: bool = True,
        engine: tuple[str, Mapping[str, Any]] | None = None,
        followers: Sequence[Mapping[str, Any]] = (),
        lasting_model_path: str | None = None,
        on_incident: Callable[[Incident], None] = lambda _: None,
        status: Status | None = None,
    ) -> AsyncIterator[Stack]:
        """Raises `ComponentDied`, `DeadlineExceeded` where a process does not come up, or its own
        `ModelError`, `ConfigError` and the like where it says why.

        `logs_stay`: whether the folder `logs` outlives this, so that errors can name its files.
        `lasting_model_path`: the same model, of whatever weights, at a place where it stays;
        default: `model_path`, which may be a recovery point's, and gone once there is a later one.
        `engine`: another engine than the configured one, as its module and what is added to its
        settings. `followers`: settings of the learner's other processes, which no others replace.
        """
        async with AsyncExitStack() as cleanup:
            temporary = Path(tempfile.gettempdir())
            folder = cleanup.enter_context(scratch_folder(temporary))
            memory = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else temporary
            weights_folder = cleanup.enter_context(scratch_folder(memory))
            if status is not None:
                cleanup.enter_context(status_served(folder, status.describe))
                status.noted.write_text(str(folder))
                cleanup.callback(status.noted.unlink, missing_ok=True)
            parts = _Parts(config, folder, logs, logs_stay, cleanup, on_incident)
            weights = WeightsInForce(
                version=policy_version, model_path=lasting_model_path or model_path
            )
            proxy, told = parts.proxy(tokenizer_path, journal)
            parts.client("records", "proxy")  # records must not stand in the way of control calls
            services = [parts.engine(model_path, tokenizer_path, weights, engine), proxy]
            if _has_children(config):
                services.append(parts.supervisor(journal.parents[1], told))
            ranks: list[Component] = []
            for follower in followers:
                name = f"learner-{follower['rank']}"
                rank = await Component.start(
                    name, "areal_sub.learner", follower,
                    folder=folder, log_path=logs / f"{name}.log",
                )  # fmt: skip
                cleanup.push_async_callback(rank.stop)
                ranks.append(rank)
            for service in services:
                await service.start()
                cleanup.push_async_callback(service.stop)
            await _all(service.introduced() for service in services)
            connected = await _connect(config, parts.clients, told)
            if config.rollout.openai.mode == "inline":
                cleanup.push_async_callback(connected["agents"].close)
            watches = tuple(asyncio.ensure_future(service.live()) for service in services)
            reading = asyncio.ensure_future(connected["stream"].run())
            # Before the processes end, so that their end is not news to who watches or reads.
            for watch in (*watches, reading):
                cleanup.push_async_callback(_cancelled, watch)
            yield cls(
                **connected,
                weights_folder=weights_folder,
                weights=weights,
                services={service.name: service for service in services},
                watches=(*watches, reading, *(rank.died for rank in ranks)),
            )


@dataclass(slots=True, kw_only=True)
class WeightsInForce:
    """What an engine that comes up has to sample with."""

    version: int
    model_path: str  # for what else there is to know of the model
    path: Path | None = None  # None: the first ones


@dataclass(slots=True)
class _Told:
    """What the components say of themselves, and others have to know."""

    port: int = 0
    listeners: Path = Path()
    sandbox: str = ""


class _Parts:
    """How each component of a run is started, and started again."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        logs: Path,
        logs_stay: bool,
        cleanup: AsyncExitStack,
        on_incident: Callable[[Incident], None],
    ) -> None:
        self.clients: dict[str, Client] = {}
        self._config = config
        self._folder = folder
        self._logs = logs
        self._logs_stay = logs_stay
        self._cleanup = cleanup
        self._on_incident = on_incident

    def engine(
        self,
        model_path: str,
        tokenizer_path: str,
        weights: WeightsInForce,
        other: tuple[str, Mapping[str, Any]] | None,
    ) -> Service:
        config, first_version = self._config, weights.version
        module, added = other or (f"areal_sub.engines.{config.engine.type}", {})

        async def launch(number: int) -> Component:
            path = model_path if weights.path is None else weights.model_path
            settings = engine_settings(
                config, self._own("engine", number), path, tokenizer_path, first_version
            )
            settings["seed"] += number  # what the last one drew is not drawn again
            return await self._launch("engine", module, {**settings, **added})

        async def introduce(number: int) -> None:
            own = self._own("engine", number)
            engine = await EngineClient.connect(own, timeout_s=self._start_s)
            try:
                await engine.info(timeout_s=self._start_s)
                while (path := weights.path) is not None:
                    version = weights.version
                    await engine.update_weights(path, version, timeout_s=self._start_s)
                    if version == weights.version:
                        break
            finally:
                await engine.close()
            own.rename(self._known("engine"))

        look = _look_for_tokens(self.client("engine"), config.deadlines.engine_silence_s)
        return self._service("engine", launch, introduce, look)

    def proxy(self, tokenizer_path: str, journal: Path) -> tuple[Service, _Told]:
        told = _Told(listeners=self._known("listeners"))

        async def launch(number: int) -> Component:
            sockets = {
                "proxy": self._own("proxy", number),
                "listeners": self._own("listeners", number),
                "engine": self._known("engine"),
            }
            settings = proxy_settings(self._config, sockets, tokenizer_path, journal)
            settings["agent_port"] = told.port  # children have it in their environment
            return await self._launch("proxy", "areal_sub.proxy", settings)

        async def introduce(number: int) -> None:
            own = self._own("proxy", number)
            client = await Client.connect(own, peer="proxy", timeout_s=self._start_s)
            try:
                told.port = (await client.call("info", timeout_s=self._start_s))["agent_port"]
            finally:
                await client.close()
            self._own("listeners", number).rename(self._known("listeners"))
            own.rename(self._known("proxy"))

        self.client("proxy")
        return self._service("proxy", launch, introduce), told

    def supervisor(self, run_folder: Path, told: _Told) -> Service:
        config = self._config

        async def launch(number: int) -> Component:
            settings = supervisor_settings(
                config, self._own("supervisor", number), self._folder, run_folder
            )
            env = supervisor_environment(os.environ, config.rollout.openai.env_passthrough)
            return await self._launch("supervisor", "areal_sub.rollout.supervisor", settings, env)

        async def introduce(number: int) -> None:
            own = self._own("supervisor", number)
            # Its first process may be up before the proxy, which says where agents call.
            info = await self.clients["proxy"].call(
                "info", timeout_s=self._start_s, idempotent=True
            )
            client = await Client.connect(own, peer="supervisor", timeout_s=self._start_s)
            try:
                told.sandbox = await SubprocPool(client).attach(
                    port=info["agent_port"], listeners=told.listeners, timeout_s=self._start_s
                )
            finally:
                await client.close()
            own.rename(self._known("supervisor"))

        self.client("supervisor")
        return self._service("supervisor", launch, introduce)

    @property
    def _start_s(self) -> float:
        timeout_s, engine = self._config.rollout.setup_timeout_s, self._config.engine
        if engine.type == "vllm":  # whose own limit gives the better error; all wait for it
            timeout_s += engine.vllm.start_timeout_s
        return timeout_s

    def _known(self, name: str) -> Path:
        """The socket that callers know."""
        return self._folder / f"{name}.sock"

    def _own(self, name: str, number: int) -> Path:
        """The socket of one process, until it is introduced."""
        return self._folder / f"{name}.{number}.sock"

    async def _launch(
        self,
        name: str,
        module: str,
        settings: Mapping[str, Any],
        env: Mapping[str, str] | None = None,
    ) -> Component:
        return await Component.start(
            name,
            module,
            settings,
            folder=self._folder,
            log_path=self._logs / f"{name}.log",
            log_stays=self._logs_stay,
            env=env,
        )

    def _service(
        self,
        name: str,
        launch: Callable[[int], Awaitable[Component]],
        introduce: Callable[[int], Awaitable[None]],
        look: Callable[[float], Awaitable[None]] | None = None,
    ) -> Service:
        scheduler, deadlines = self._config.scheduler, self._config.deadlines
        return Service(
            name,
            Steps(launch=launch, introduce=introduce, look=look),
            self.clients[name],
            Limits(
                start_s=self._start_s,
                heartbeat_s=deadlines.heartbeat_s,
                shutdown_s=deadlines.shutdown_s,
                max_restarts=scheduler.max_restarts,
                window_s=scheduler.restart_window_s,
            ),
            on_incident=self._on_incident,
        )

    def client(self, name: str, peer: str | None = None) -> Client:
        """A connection to `peer`, or to the component that is called as the connection is."""
        client = Client(self._known(peer or name), peer=peer or name, redials=True)
        self.clients[name] = client
        self._cleanup.push_async_callback(client.close)
        return client


def _look_for_tokens(client: Client, silence_s: float) -> Callable[[float], Awaitable[None]]:
    """Raises `DeadlineExceeded` where the engine has work, and nothing comes of it."""
    engine = EngineClient(client)
    last: tuple[int, ...] = ()
    since = time.monotonic()

    async def look(limit_s: float) -> None:
        nonlocal last, since
        info = await engine.info(timeout_s=limit_s)
        now = (info.num_generated_tokens, info.num_decode_steps, info.policy_version)
        if now != last or not (info.num_running or info.num_waiting):
            last, since = now, time.monotonic()
        elif time.monotonic() - since > silence_s:
            raise DeadlineExceeded(
                f"no token for {info.num_running} running and {info.num_waiting} waiting requests "
                f"in {silence_s:g} s (deadlines.engine_silence_s)"
            )

    return look


async def _all(coming_up: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Until all are done. Raises the first error, and waits for nobody then."""
    tasks = [asyncio.ensure_future(each) for each in coming_up]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _connect(config: Config, clients: Mapping[str, Client], told: _Told) -> dict[str, Any]:
    timeout_s = config.rollout.setup_timeout_s
    engine = EngineClient(clients["engine"])
    agents: AgentRunner
    grader: Grader | None = None
    if _has_children(config):
        agents = pool = SubprocPool(clients["supervisor"])
        if config.rollout.openai.reward != "agent":
            grader = Grader(pool, config.rollout.openai)
    if config.rollout.openai.mode == "inline":
        agents = InlineRunner()
    stream = TrajectoryStream(clients["records"])
    rollouts = RolloutRunner(
        proxy=clients["proxy"],
        proxy_port=told.port,
        stream=stream,
        agents=agents,
        config=config.rollout,
        grader=grader,
        control_timeout_s=config.deadlines.control_s,
    )
    return {
        "engine": engine,
        "engine_info": await engine.info(timeout_s=timeout_s),
        "proxy": clients["proxy"],
        "proxy_port": told.port,
        "stream": stream,
        "agents": agents,
        "sandbox": told.sandbox,
        "rollouts": rollouts,
    }


def _has_children(config: Config) -> bool:
    openai = config.rollout.openai
    return openai.mode == "subproc" or openai.reward != "agent"
