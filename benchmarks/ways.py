"""Ways of running an agent, each in a process of its own: `python -m benchmarks.ways WAY`.

Called by `rollouts.py`, which measures from outside. The process gets ready (imports, starts its
workers, runs a first rollout, lets the reserve fill), prints `ready` and what is to note, waits for
a line, runs `num` rollouts with at most `at_once` at a time, prints the wall time in seconds, and
waits for the end of its input.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from areal_sub.config.schema import SandboxConfig
from areal_sub.records import Outcome, RunRequest
from areal_sub.rollout.environ import agent_environment, supervisor_environment
from areal_sub.rollout.inline import InlineRunner
from areal_sub.rollout.pool import SubprocPool
from areal_sub.rpc import Client
from areal_sub.schedulers.local import Component
from benchmarks.one_turn import TASK, OneTurn
from benchmarks.tree import until_standing

ROOT = Path(__file__).parents[1]
TARGET = "benchmarks.one_turn:OneTurn"
TIMEOUT_S = 120.0
AREAL_WORKERS = 4  # its default

Rollout = Callable[[], Awaitable[Any]]  # returns the reward
Way = Callable[[argparse.Namespace], AbstractAsyncContextManager[Rollout]]


_numbers = itertools.count()


def _request(port: int, **workflow_kwargs: Any) -> RunRequest:
    return RunRequest(
        rollout_id=f"benchmark-{os.getpid()}-{next(_numbers)}",
        target=TARGET,
        pickled=b"",
        workflow_kwargs=workflow_kwargs,
        data=TASK,
        env=agent_environment(port=port, key="key", extra={}),
        timeout_s=TIMEOUT_S,
    )


@asynccontextmanager
async def _inline(args: argparse.Namespace, *, shared_client: bool) -> AsyncIterator[Rollout]:
    runner = InlineRunner()

    async def rollout() -> Any:
        report = await runner.run(_request(args.port, shared_client=shared_client))
        assert report.outcome is Outcome.COMPLETED, report
        return report.result

    yield rollout
    await runner.close()


def inline_shared(args: argparse.Namespace) -> AbstractAsyncContextManager[Rollout]:
    """In this event loop, with the shared HTTP client."""
    return _inline(args, shared_client=True)


def inline_fresh(args: argparse.Namespace) -> AbstractAsyncContextManager[Rollout]:
    """In this event loop, each with an HTTP client of its own."""
    return _inline(args, shared_client=False)


def pool(args: argparse.Namespace) -> AbstractAsyncContextManager[Rollout]:
    """A fresh sandboxed child of a warm zygote each: `rollout.openai.mode=subproc`."""
    return _pool(args, tier="auto")


def pool_standing(args: argparse.Namespace) -> AbstractAsyncContextManager[Rollout]:
    """The same, where a child for each rollout of the batch stands ready before it begins."""
    return _pool(args, tier="auto", reserve=args.num)


def pool_without_namespaces(args: argparse.Namespace) -> AbstractAsyncContextManager[Rollout]:
    """The same, in the tier for hosts that refuse namespaces."""
    return _pool(args, tier="process")


@asynccontextmanager
async def _pool(
    args: argparse.Namespace, *, tier: str, reserve: int | None = None
) -> AsyncIterator[Rollout]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = {
            "socket_path": str(folder / "supervisor.sock"),
            "work_dir": str(folder / "children"),
            "python_path": [str(ROOT)],
            "env_passthrough": [],
            "max_children": args.at_once,
            "sandbox": SandboxConfig.model_validate(
                {"tier": tier} | ({} if reserve is None else {"reserve": reserve})
            ).model_dump(),
        }
        supervisor = await Component.start(
            "supervisor",
            "areal_sub.rollout.supervisor",
            settings,
            folder=folder,
            log_path=folder / "supervisor.log",
            env=supervisor_environment(os.environ),
        )
        client = await Client.connect(folder / "supervisor.sock", peer="supervisor")
        runner = SubprocPool(client)
        await runner.attach(port=args.port, listeners=args.door, timeout_s=TIMEOUT_S)
        await runner.warm(TARGET)

        async def rollout() -> Any:
            report = await runner.run(_request(args.port))
            assert report.outcome is Outcome.COMPLETED, report
            return report.result

        if reserve is not None:
            args.settled = partial(_standing, client, supervisor.pid, reserve)
        yield rollout
        await client.close()
        await supervisor.stop()


async def _standing(client: Client, pid: int, num: int) -> str:
    """Returns when `num` children stand ready below the supervisor: what they take of memory."""

    async def all_there() -> bool:
        stats = await client.call("stats", {}, timeout_s=TIMEOUT_S)
        return int(stats["num_standing"]) >= num

    await until_standing(pid, all_there)
    own_bytes = 0
    for process in psutil.Process().children(recursive=True):
        if process.name() in ("sandbox-init", "sandbox-child"):
            own_bytes += process.memory_full_info().uss
    return f"{num} children stand ready, {own_bytes / num / 2**20:.1f} MiB of their own each"


@asynccontextmanager
async def bare_fork(args: argparse.Namespace) -> AsyncIterator[Rollout]:
    """A bare `os.fork` of a process as warm as a zygote each: no limits, no isolation, no result
    but an exit code, nothing killed. A server forks one at a time, so there is one per core."""
    free: asyncio.Queue[asyncio.subprocess.Process] = asyncio.Queue()
    command = (sys.executable, "-m", "benchmarks.bare_fork", TARGET, str(args.port))
    pipe = asyncio.subprocess.PIPE
    servers = [
        await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, cwd=ROOT)
        for _ in range(os.cpu_count() or 1)
    ]

    async def line(server: asyncio.subprocess.Process) -> bytes:
        assert server.stdout is not None
        return await server.stdout.readline()

    for server in servers:
        await line(server)
        free.put_nowait(server)

    async def rollout() -> Any:
        server = await free.get()
        assert server.stdin is not None
        server.stdin.write(b"\n")
        code = int(await line(server))
        free.put_nowait(server)
        return 1.0 - code

    yield rollout
    for server in servers:
        assert server.stdin is not None
        server.stdin.close()
        await server.wait()


@asynccontextmanager
async def process(args: argparse.Namespace) -> AsyncIterator[Rollout]:
    """A fresh `python agent.py` each."""
    env = os.environ | agent_environment(port=args.port, key="key", extra={})

    async def rollout() -> Any:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.one_turn", env=env, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await child.communicate()
        return float(output)

    yield rollout


def _areal_call(agent: OneTurn, data: dict[str, Any], env: dict[str, str]) -> float:
    os.environ.update(env)
    return asyncio.run(agent.run(data))


@asynccontextmanager
async def areal(args: argparse.Namespace) -> AsyncIterator[Rollout]:
    """AReaL's `subproc`: agent and result pickled, a process pool of 4 that is used again."""
    env = agent_environment(port=args.port, key="key", extra={})
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(AREAL_WORKERS) as executor:

        async def rollout() -> Any:
            return await loop.run_in_executor(executor, _areal_call, OneTurn(), TASK, env)

        await asyncio.gather(*(rollout() for _ in range(4 * AREAL_WORKERS)))  # all of it warm
        yield rollout


WAYS: dict[str, Way] = {
    "inline, shared client": inline_shared,
    "inline, fresh client each": inline_fresh,
    "this pool": pool,
    "this pool, standing ready": pool_standing,
    "this pool, tier process": pool_without_namespaces,
    "bare fork each": bare_fork,
    "python agent.py each": process,
    "ProcessPoolExecutor(4)": areal,
}


async def measure(args: argparse.Namespace) -> None:
    async with WAYS[args.way](args) as rollout:
        slots = asyncio.Semaphore(args.at_once)

        async def one() -> Any:
            async with slots:
                return await rollout()

        await one()
        print("ready", await args.settled() if "settled" in args else "", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        started_at = time.monotonic()
        rewards = await asyncio.gather(*(one() for _ in range(args.num)))
        wall_s = time.monotonic() - started_at
        assert rewards == [1.0] * args.num, rewards
        print(wall_s, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--door", type=Path, required=True)
    parser.add_argument("--num", type=int, required=True)
    parser.add_argument("--at-once", type=int, required=True)
    asyncio.run(measure(parser.parse_args()))
