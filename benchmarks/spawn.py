"""What it costs to begin: from "run this" to the first answered model call, sealed or not.

    python -m benchmarks.spawn [--num 100] [--json FILE]

p50 and p95 of one child after the other, and children per second with one and with two at a time
(one driver: what two workers gain is what the children do beside it). Two things are done in each:
nothing at all, and one call with the real, synchronous OpenAI SDK, answered at once by a stub.
Ratios are to a bare fork of a warm process that does the same and to a fresh interpreter.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from benchmarks.rollouts import ROOT, read_line, start
from sandbox import Ending, PlanError, Sandbox, SandboxSpec
from sandbox.layers.environ import allowed

NOTHING, CALL = "benchmarks.first_call:nothing", "benchmarks.first_call:call"
Once = Callable[[], Awaitable[None]]


def _env(port: int) -> dict[str, str]:
    return {"OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1", "OPENAI_API_KEY": "key"}


@asynccontextmanager
async def sandboxed(
    target: str, port: int, door: Path, *, tier: str, reserve: int = 0
) -> AsyncIterator[Once]:
    """A fresh child of a warm zygote each, in one of the sandbox's tiers."""
    spec = SandboxSpec(tier=tier, env=allowed(os.environ), port=port)
    to_stub = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    to_stub.connect(str(door))
    numbers = iter(range(10**9))

    async def hand_over(listener: int) -> None:
        socket.send_fds(to_stub, [f"{id(numbers)}-{next(numbers)}".encode()], [listener])

    async with Sandbox(spec, target=target, python_path=[str(ROOT)], reserve=reserve) as box:

        async def once() -> None:
            report = await box.zygote.run({}, env=_env(port), on_listener=hand_over)
            assert report.ending is Ending.RETURNED, report

        yield once
    to_stub.close()


@asynccontextmanager
async def program(argv: list[str], port: int) -> AsyncIterator[Once]:
    """A fresh process each."""

    async def once() -> None:
        child = await asyncio.create_subprocess_exec(
            *argv, env=os.environ | _env(port), cwd=ROOT, stdout=asyncio.subprocess.DEVNULL
        )
        assert await child.wait() == 0, argv

    yield once


@asynccontextmanager
async def forked(target: str, port: int) -> AsyncIterator[Once]:
    """A bare `os.fork` of a warm process: no limits, no isolation, nothing killed. Such a server
    forks one at a time, so there are two."""
    async with one_fork_server(target, port) as first, one_fork_server(target, port) as second:
        free: asyncio.Queue[Once] = asyncio.Queue()
        for server in (first, second):
            free.put_nowait(server)

        async def once() -> None:
            server = await free.get()
            await server()
            free.put_nowait(server)

        yield once


@asynccontextmanager
async def one_fork_server(target: str, port: int) -> AsyncIterator[Once]:
    with start("benchmarks.bare_fork", target, str(port)) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        read_line(server)
        loop = asyncio.get_running_loop()
        pipe = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(pipe), server.stdout)

        async def once() -> None:
            print(file=server.stdin, flush=True)
            assert await pipe.readline() == b"0\n"

        yield once
        server.stdin.close()
        await loop.run_in_executor(None, server.wait)


@asynccontextmanager
async def executor(target: str, port: int, *, method: str, reused: bool) -> AsyncIterator[Once]:
    """`ProcessPoolExecutor(2)`, its workers reused, or one task per worker."""
    module, _, name = target.partition(":")
    function = getattr(__import__(module, fromlist=[name]), name)
    os.environ.update(_env(port))
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["openai", module])
    loop = asyncio.get_running_loop()
    with ProcessPoolExecutor(
        2, mp_context=context, max_tasks_per_child=None if reused else 1
    ) as workers:

        async def once() -> None:
            await loop.run_in_executor(workers, function, {})

        yield once


def ways(target: str, port: int, door: Path) -> dict[str, AbstractAsyncContextManager[Once]]:
    called = target == CALL
    python = [sys.executable, "-c", "import openai"]
    if called:
        python = [sys.executable, "-m", "benchmarks.first_call"]
    found: dict[str, AbstractAsyncContextManager[Once]] = {
        "bare fork": forked(target, port),
        "tier namespaces": sandboxed(target, port, door, tier="namespaces"),
        "tier namespaces, reserve": sandboxed(target, port, door, tier="namespaces", reserve=4),
        "tier process": sandboxed(target, port, door, tier="process"),
        "tier gvisor": sandboxed(target, port, door, tier="gvisor"),
        "tier bwrap": sandboxed(target, port, door, tier="bwrap"),
        "fresh python": program(python, port),
        "executor, reused": executor(target, port, method="fork", reused=True),
        "forkserver, fresh": executor(target, port, method="forkserver", reused=False),
        "spawn, fresh": executor(target, port, method="spawn", reused=False),
    }
    bwrap = shutil.which("bwrap")
    if bwrap:
        sealed = [bwrap, "--ro-bind", "/", "/", "--unshare-all", "--dev", "/dev", "--proc", "/proc"]
        inside = [*sealed, "--share-net", *python] if called else [*sealed, "/bin/true"]
        found["bwrap python" if called else "bwrap true"] = program(inside, port)
    runsc = shutil.which("runsc")
    if runsc and not called:  # in there is no way to the stub
        found["runsc true"] = program(
            [runsc, "--rootless", "--network=none", "--ignore-cgroups", "do", "/bin/true"], port
        )
    return found


async def measure(way: AbstractAsyncContextManager[Once], num: int) -> dict[str, float] | PlanError:
    try:
        async with way as once:
            for _ in range(3):
                await once()
            seconds = []
            began_at = time.perf_counter()
            for _ in range(num):
                started_at = time.perf_counter()
                await once()
                seconds.append(time.perf_counter() - started_at)
            one_at_a_time = num / (time.perf_counter() - began_at)
            slots = asyncio.Semaphore(2)

            async def in_turn() -> None:
                async with slots:
                    await once()

            began_at = time.perf_counter()
            await asyncio.gather(*(in_turn() for _ in range(num)))
            two_at_a_time = num / (time.perf_counter() - began_at)
    except PlanError as error:
        return error
    cuts = statistics.quantiles(seconds, n=20)
    return {
        "p50_ms": 1000 * statistics.median(seconds),
        "p95_ms": 1000 * cuts[-1],
        "per_s": one_at_a_time,
        "per_s_2": two_at_a_time,
    }


def show(title: str, rows: dict[str, dict[str, float] | PlanError]) -> None:
    print(f"\n{title}")
    head = ("", "p50 ms", "p95 ms", "1 worker /s", "2 workers /s", "x bare fork", "x faster*")
    print(("{:<26}" + "{:>13}" * 6).format(*head))
    fork, fresh = rows.get("bare fork"), rows.get("fresh python")
    for name, row in rows.items():
        if isinstance(row, PlanError):
            print(f"{name:<26} not to be had here: {row}")
            continue
        against_fork = row["p50_ms"] / fork["p50_ms"] if isinstance(fork, dict) else 0
        against_fresh = fresh["p50_ms"] / row["p50_ms"] if isinstance(fresh, dict) else 0
        cells = (
            f"{row['p50_ms']:.1f}",
            f"{row['p95_ms']:.1f}",
            f"{row['per_s']:.0f}",
            f"{row['per_s_2']:.0f}",
            f"{against_fork:.1f}",
            f"{against_fresh:.1f}",
        )
        print(("{:<26}" + "{:>13}" * 6).format(name, *cells))


async def run(args: argparse.Namespace, port: int, door: Path) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for title, target in (
        ("a child that does nothing", NOTHING),
        ("to the answer of its first call", CALL),
    ):
        rows = {}
        for name, way in ways(target, port, door).items():
            slow = name in ("fresh python", "spawn, fresh", "bwrap python", "runsc true")
            rows[name] = await measure(way, max(5, args.num // 10) if slow else args.num)
        show(title, rows)
        tables[title] = {name: row for name, row in rows.items() if isinstance(row, dict)}
    print("\n* than a fresh interpreter (`import openai`; in the second table, and its first call)")
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--num", type=int, default=100, help="children per way; slow ways a tenth")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        door = Path(folder) / "door"
        with start("benchmarks.stub", str(door)) as stub:
            tables = asyncio.run(run(args, int(read_line(stub)), door))
            assert stub.stdin is not None
            stub.stdin.close()
    if args.json:
        args.json.write_text(json.dumps(tables, indent=2) + "\n")


if __name__ == "__main__":
    main()
