"""Starts the processes of a run and connects to them: engine, proxy, supervisor.

`async with Stack.start(...)` yields the connections; leaving it ends every process. `Stack.guard`
runs a coroutine for as long as all of them live: the first one that dies ends it with a
`ComponentDied` that names the process and the end of its log.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from areal_sub.config import Config
from areal_sub.engine_client import EngineClient
from areal_sub.errors import ConfigError
from areal_sub.records import EngineInfo
from areal_sub.rollout.attempt import AgentRunner, RolloutRunner
from areal_sub.rollout.grader import Grader
from areal_sub.rollout.inline import InlineRunner
from areal_sub.rollout.mix import Agent
from areal_sub.rollout.pool import SubprocPool
from areal_sub.rollout.workspace import fixed_part
from areal_sub.rpc import Client
from areal_sub.schedulers.local import Component
from areal_sub.trainer.scratch import scratch_folder
from areal_sub.trajectory.stream import TrajectoryStream

T = TypeVar("T")

_SHARED_MEMORY = Path("/dev/shm")
# The supervisor and its children get no more of our environment than this.
_SUPERVISOR_ENV = ("PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "AREAL_SUB_LOG")


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
    watches: tuple[asyncio.Task[None], ...]

    async def guard(self, work: Coroutine[Any, Any, T]) -> T:
        """`work`'s result. Raises `ComponentDied` as soon as a process ends under it."""
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
        wanted = dict.fromkeys((a.target, a.pickled, a.python, a.readable) for a in agents)
        return [
            note
            for target, pickled, python, readable in wanted
            for note in await self.agents.warm(target, pickled, python=python, readable=readable)
        ]

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
        engine: tuple[str, Mapping[str, Any]] | None = None,
    ) -> AsyncIterator[Stack]:
        """Raises `ComponentDied`, `DeadlineExceeded` where a process does not come up.

        `engine`: another engine than the configured one, as its module and what is added to its
        settings.
        """
        async with AsyncExitStack() as cleanup:
            temporary = Path(tempfile.gettempdir())
            folder = cleanup.enter_context(scratch_folder(temporary))
            memory = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else temporary
            weights_folder = cleanup.enter_context(scratch_folder(memory))

            components: list[Component] = []

            async def start_component(
                name: str,
                module: str,
                settings: Mapping[str, Any],
                env: Mapping[str, str] | None = None,
            ) -> None:
                component = await Component.start(
                    name, module, settings, folder=folder, log_path=logs / f"{name}.log", env=env
                )
                cleanup.push_async_callback(component.stop)
                components.append(component)

            names = ("engine", "proxy", "listeners", "supervisor")
            sockets = {name: folder / f"{name}.sock" for name in names}
            module, settings = engine or (f"areal_sub.engines.{config.engine.type}", {})
            await start_component(
                "engine",
                module,
                {
                    **_engine_settings(
                        config, sockets["engine"], model_path, tokenizer_path, policy_version
                    ),
                    **settings,
                },
            )
            await start_component(
                "proxy",
                "areal_sub.proxy",
                _proxy_settings(config, sockets, tokenizer_path, journal),
            )
            if _has_children(config):
                await start_component(
                    "supervisor",
                    "areal_sub.rollout.supervisor",
                    _supervisor_settings(config, sockets["supervisor"], folder, journal.parents[1]),
                    _supervisor_env(config),
                )

            connecting = _connect(config, sockets, cleanup)
            died = tuple(component.died for component in components)
            stack = await _first_of(connecting, died, cls, weights_folder)
            # Before the processes end, so that their end is not news to the reader of the stream.
            cleanup.push_async_callback(_cancelled, stack.watches[-1])
            yield stack


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _first_of(
    connecting: Coroutine[Any, Any, dict[str, Any]],
    died: tuple[asyncio.Task[None], ...],
    cls: type[Stack],
    weights_folder: Path,
) -> Stack:
    """Connected, unless a process dies or a stream breaks first."""
    task = asyncio.ensure_future(connecting)
    try:
        await asyncio.wait({task, *died}, return_when=asyncio.FIRST_COMPLETED)
        for watch in died:
            if watch.done():
                watch.result()
        parts = await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    reading = asyncio.ensure_future(parts["stream"].run())
    return cls(**parts, weights_folder=weights_folder, watches=(*died, reading))


async def _connect(
    config: Config, sockets: Mapping[str, Path], cleanup: AsyncExitStack
) -> dict[str, Any]:
    timeout_s = config.rollout.setup_timeout_s
    engine_timeout_s = timeout_s
    if config.engine.type == "vllm":  # whose own limit gives the better error
        engine_timeout_s += config.engine.vllm.start_timeout_s
    engine = await EngineClient.connect(sockets["engine"], timeout_s=engine_timeout_s)
    cleanup.push_async_callback(engine.close)
    engine_info = await engine.info(timeout_s=timeout_s)
    proxy = await Client.connect(sockets["proxy"], peer="proxy", timeout_s=timeout_s)
    cleanup.push_async_callback(proxy.close)
    # A connection of its own: records must not stand in the way of control calls.
    records = await Client.connect(sockets["proxy"], peer="proxy", timeout_s=timeout_s)
    cleanup.push_async_callback(records.close)
    port = (await proxy.call("info", timeout_s=timeout_s))["agent_port"]
    agents: AgentRunner
    sandbox = ""
    grader: Grader | None = None
    if _has_children(config):
        supervisor = await Client.connect(
            sockets["supervisor"], peer="supervisor", timeout_s=timeout_s
        )
        cleanup.push_async_callback(supervisor.close)
        agents = pool = SubprocPool(supervisor)
        sandbox = await pool.attach(port=port, listeners=sockets["listeners"], timeout_s=timeout_s)
        if config.rollout.openai.reward != "agent":
            grader = Grader(pool, config.rollout.openai)
    if config.rollout.openai.mode == "inline":
        agents = inline = InlineRunner()
        cleanup.push_async_callback(inline.close)
    stream = TrajectoryStream(records)
    rollouts = RolloutRunner(
        proxy=proxy,
        proxy_port=port,
        stream=stream,
        agents=agents,
        config=config.rollout,
        grader=grader,
    )
    return {
        "engine": engine,
        "engine_info": engine_info,
        "proxy": proxy,
        "proxy_port": port,
        "stream": stream,
        "agents": agents,
        "sandbox": sandbox,
        "rollouts": rollouts,
    }


def _has_children(config: Config) -> bool:
    openai = config.rollout.openai
    return openai.mode == "subproc" or openai.reward != "agent"


def _engine_settings(
    config: Config, socket: Path, model_path: str, tokenizer_path: str, policy_version: int
) -> dict[str, Any]:
    engine = config.engine
    common = {
        "socket_path": str(socket),
        "model_path": model_path,
        "dtype": engine.dtype or config.actor.dtype,
        "max_running_requests": engine.max_running_requests,
        "max_model_len": engine.max_model_len,
        "seed": config.seed,
        "policy_version": policy_version,
    }
    if engine.type == "vllm":
        # A server that was started by someone else has the trainer's working directory at best.
        return {**common, **engine.vllm.model_dump(), "model_path": str(Path(model_path).resolve())}
    return {
        **common,
        "tokenizer_path": tokenizer_path,
        "device": engine.device,
        "num_threads": engine.num_threads,
    }


def _proxy_settings(
    config: Config, sockets: Mapping[str, Path], tokenizer_path: str, journal: Path
) -> dict[str, Any]:
    return {
        "agent_host": "127.0.0.1",
        "agent_port": 0,
        "control_path": str(sockets["proxy"]),
        "listeners_path": str(sockets["listeners"]),
        "engine_path": str(sockets["engine"]),
        "journal_path": str(journal),
        "journal": config.journal.model_dump(),
        "tokenizer_path": tokenizer_path,
        "chat_template": config.rollout.openai.chat_template,
        "tool_call_parser": config.rollout.openai.tool_call_parser,
        "reasoning_parser": config.rollout.openai.reasoning_parser,
        "request_timeout_s": config.rollout.request_timeout_s,
    }


def _supervisor_settings(
    config: Config, socket: Path, folder: Path, run_folder: Path
) -> dict[str, Any]:
    """Raises `ConfigError` where agents would see the whole home folder."""
    openai = config.rollout.openai
    python_path = _python_path(openai.python_path)
    hidden = [_hidden(Path(config.cluster.fileroot).resolve(), run_folder, python_path)]
    grader_hidden = [*hidden]  # what is around workspaces may be what rollouts are graded by
    if openai.sandbox.workspace is not None:
        hidden.append(_around_workspaces(openai.sandbox.workspace, python_path))
    return {
        "socket_path": str(socket),
        "work_dir": str(folder / "children"),
        "python_path": python_path,
        "start_timeout_s": config.rollout.setup_timeout_s,
        "env_passthrough": openai.env_passthrough,
        "max_children": openai.num_children or config.rollout.max_concurrent_rollouts,
        "sandbox": openai.sandbox.model_dump(),
        "hidden": hidden,
        "grader_hidden": grader_hidden,
        "grader_memory_bytes": openai.reward_max_memory_bytes,
    }


def _python_path(extra: list[str]) -> list[str]:
    """Where children find the agent: where the user stands, then beside the user's script."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    beside = [str(Path(script).parent)] if script else []
    folders = [Path(folder).resolve() for folder in (*extra, str(Path.cwd()), *beside)]
    home = Path.home().resolve()
    for folder in folders:
        if home.is_relative_to(folder):
            raise ConfigError(
                f"agents can read the folders that they are imported from, and {folder} holds your "
                "home folder: start in a folder of its own for your project"
            )
    return [str(folder) for folder in dict.fromkeys(folders)]


def _hidden(fileroot: Path, run_folder: Path, python_path: list[str]) -> str:
    """Checkpoints and journals of this run and of others: agents have no business there."""
    holds_agents = any(Path(folder).is_relative_to(fileroot) for folder in python_path)
    return str(run_folder.resolve() if holds_agents else fileroot)


def _around_workspaces(template: str, python_path: list[str]) -> str:
    """Agents find a copy of their own; the templates, graders among them maybe, are not theirs.

    Raises `ConfigError` where that would hide the agents' code.
    """
    folder = fixed_part(template, Path.cwd())
    for path in python_path:
        if Path(path).is_relative_to(folder):
            raise ConfigError(
                f"rollout.openai.sandbox.workspace={template}: the folder around all workspaces is "
                f"hidden from agents, and {folder} holds {path}, which they are imported from: put "
                "workspaces into a folder of their own"
            )
    return str(folder)


def _supervisor_env(config: Config) -> dict[str, str]:
    names = (*_SUPERVISOR_ENV, *config.rollout.openai.env_passthrough)
    return {name: os.environ[name] for name in names if name in os.environ}
