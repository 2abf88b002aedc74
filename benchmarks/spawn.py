"""What it costs to begin: from "run this" to the first answered model call, sealed or not.

    python -m benchmarks.spawn [--num 100] [--agents-python PYTHON] [--json FILE]

p50 and p95 of one child after the other, CPU of each with all that is done for it, and children per
second with one and with two at a time (one driver: what two workers gain is what the children do
beside it). Done in each: nothing at all; one call with the real, synchronous OpenAI SDK, answered
at once by a stub; and the same by an agent of the OpenAI Agents SDK, where PYTHON is an interpreter
whose environment has it. Ratios are to a bare fork of a warm process that does the same and to a
fresh interpreter. What stands ready was made before the clock started.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.rollouts import ROOT, goal, read_line, start
from benchmarks.tree import tree_cpu_s, until_standing
from sandbox import Ending, Sandbox, SandboxError, SandboxSpec
from sandbox.layers.environ import allowed

_numbers = itertools.count()
Once = Callable[[], Awaitable[None]]
NUM_WARM_UP = 3
STANDING = "namespaces, standing ready"
SLOW = ("fresh python", "spawn, fresh", "bwrap python", "runsc true", "tier gvisor")
"""A tenth of the number of children will do."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is done in each child."""

    title: str
    target: str
    program: tuple[str, ...]
    """The same by a fresh interpreter: its arguments."""
    python: str = sys.executable
    calls: bool = True

    @property
    def argv(self) -> list[str]:
        return [self.python, *self.program]


NOTHING = Subject(
    "a child that does nothing",
    "benchmarks.first_call:nothing",
    ("-c", "import openai"),
    calls=False,
)
CALL = Subject(
    "to the answer of its first call", "benchmarks.first_call:call", ("-m", "benchmarks.first_call")
)
AGENT = Subject(
    "to the answer of an openai-agents agent's first call",
    "benchmarks.first_agent:call",
    ("-m", "benchmarks.first_agent"),
)


async def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Ready:
    once: Once
    settle: Once = _nothing
    """Returns when those that stand ready do."""


Way = AbstractAsyncContextManager[Ready]


def _env(port: int) -> dict[str, str]:
    return {"OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1", "OPENAI_API_KEY": "key"}


@asynccontextmanager
async def sandboxed(
    subject: Subject, port: int, door: Path, *, tier: str, reserve: int = 0
) -> AsyncIterator[Ready]:
    """A fresh child of a warm zygote each, in one of the sandbox's tiers."""
    spec = SandboxSpec(tier=tier, env=allowed(os.environ), port=port)
    to_stub = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    to_stub.connect(str(door))

    async def hand_over(listener: int) -> None:
        socket.send_fds(to_stub, [f"benchmark-{next(_numbers)}".encode()], [listener])

    async with Sandbox(
        spec,
        target=subject.target,
        python=subject.python,
        python_path=[str(ROOT)],
        reserve=reserve,
    ) as box:

        async def once() -> None:
            report = await box.zygote.run({}, env=_env(port), on_listener=hand_over)
            assert (report.ending, report.value) == (Ending.RETURNED, 1.0), report

        async def settle() -> None:
            async def all_there() -> bool:
                return box.zygote.num_standing >= reserve

            if reserve:
                await until_standing(box.zygote.guardian_pid, all_there)

        yield Ready(once, settle)
    to_stub.close()


@asynccontextmanager
async def program(argv: list[str], port: int) -> AsyncIterator[Ready]:
    """A fresh process each."""

    async def once() -> None:
        child = await asyncio.create_subprocess_exec(
            *argv, env=os.environ | _env(port), cwd=ROOT, stdout=asyncio.subprocess.DEVNULL
        )
        assert await child.wait() == 0, argv

    yield Ready(once)


@asynccontextmanager
async def forked(subject: Subject, port: int) -> AsyncIterator[Ready]:
    """A bare `os.fork` of a warm process: no limits, no isolation, nothing killed. Such a server
    forks one at a time, so there are two."""
    async with one_fork_server(subject, port) as first, one_fork_server(subject, port) as second:
        free: asyncio.Queue[Once] = asyncio.Queue()
        for server in (first, second):
            free.put_nowait(server)

        async def once() -> None:
            server = await free.get()
            await server()
            free.put_nowait(server)

        yield Ready(once)


@asynccontextmanager
async def one_fork_server(subject: Subject, port: int) -> AsyncIterator[Once]:
    words = ("benchmarks.bare_fork", subject.target, str(port))
    with start(*words, python=subject.python) as server:
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
async def executor(
    subject: Subject, port: int, *, method: str, reused: bool
) -> AsyncIterator[Ready]:
    """`ProcessPoolExecutor(2)`, its workers reused, or one task per worker."""
    module, _, name = subject.target.partition(":")
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
            assert await loop.run_in_executor(workers, function, {}) == 1.0

        yield Ready(once)


def ways(subject: Subject, port: int, door: Path, num: int) -> dict[str, Way]:
    def tier(name: str, reserve: int = 0) -> Way:
        return sandboxed(subject, port, door, tier=name, reserve=reserve)

    found = {
        "bare fork": forked(subject, port),
        "tier namespaces": tier("namespaces"),
        STANDING: tier("namespaces", num + NUM_WARM_UP),
        "tier process": tier("process"),
        "tier gvisor": tier("gvisor"),
        "tier bwrap": tier("bwrap"),
        "fresh python": program(subject.argv, port),
    }
    if subject.python == sys.executable:
        found |= {
            "executor, reused": executor(subject, port, method="fork", reused=True),
            "forkserver, fresh": executor(subject, port, method="forkserver", reused=False),
            "spawn, fresh": executor(subject, port, method="spawn", reused=False),
        }
    if bwrap := shutil.which("bwrap"):
        sealed = [bwrap, "--ro-bind", "/", "/", "--unshare-all", "--dev", "/dev", "--proc", "/proc"]
        inside = (
            [*sealed, "--share-net", *subject.argv] if subject.calls else [*sealed, "/bin/true"]
        )
        found["bwrap python" if subject.calls else "bwrap true"] = program(inside, port)
    runsc = shutil.which("runsc")
    if runsc and not subject.calls:  # in there is no way to the stub
        found["runsc true"] = program(
            [runsc, "--rootless", "--network=none", "--ignore-cgroups", "do", "/bin/true"], port
        )
    return found


Row = dict[str, float]


async def measure(way: Way, num: int, stub_pid: int) -> Row | SandboxError:
    def cpu_s() -> float:
        return tree_cpu_s(psutil.Process()) - tree_cpu_s(psutil.Process(stub_pid))

    try:
        async with way as ready:
            await ready.settle()
            for _ in range(NUM_WARM_UP):
                await ready.once()
            seconds = []
            before_s = cpu_s()
            began_at = time.perf_counter()
            for _ in range(num):
                started_at = time.perf_counter()
                await ready.once()
                seconds.append(time.perf_counter() - started_at)
            one_at_a_time = num / (time.perf_counter() - began_at)
            used_s = cpu_s() - before_s
            await ready.settle()
            slots = asyncio.Semaphore(2)

            async def in_turn() -> None:
                async with slots:
                    await ready.once()

            began_at = time.perf_counter()
            await asyncio.gather(*(in_turn() for _ in range(num)))
            two_at_a_time = num / (time.perf_counter() - began_at)
    except SandboxError as error:
        return error
    cuts = statistics.quantiles(seconds, n=20)
    return {
        "p50_ms": 1000 * statistics.median(seconds),
        "p95_ms": 1000 * cuts[-1],
        "cpu_ms": 1000 * used_s / num,
        "per_s": one_at_a_time,
        "per_s_2": two_at_a_time,
    }


def show(title: str, rows: dict[str, Row | SandboxError]) -> None:
    print(f"\n{title}")
    head = ("p50 ms", "p95 ms", "CPU ms", "1 worker /s", "2 workers /s", "x bare fork", "x faster*")
    print(f"{'':<26}" + ("{:>13}" * len(head)).format(*head))
    fork, fresh = rows.get("bare fork"), rows.get("fresh python")
    for name, row in rows.items():
        if not isinstance(row, dict):
            print(f"{name:<26} not to be had here: {row}")
            continue
        against_fork = row["p50_ms"] / fork["p50_ms"] if isinstance(fork, dict) else 0
        against_fresh = fresh["p50_ms"] / row["p50_ms"] if isinstance(fresh, dict) else 0
        cells = (
            f"{row['p50_ms']:.1f}",
            f"{row['p95_ms']:.1f}",
            f"{row['cpu_ms']:.1f}",
            f"{row['per_s']:.0f}",
            f"{row['per_s_2']:.0f}",
            f"{against_fork:.1f}",
            f"{against_fresh:.1f}",
        )
        print(f"{name:<26}" + ("{:>13}" * len(head)).format(*cells))


def goals(tables: Mapping[str, Mapping[str, Row]]) -> Iterator[str]:
    """What was aimed at, what it came to by p50, and whether that is met."""
    for title, table in tables.items():
        for name in ("tier namespaces", STANDING):
            if name not in table:
                continue
            way, p50_ms = f"{name}; {title}", table[name]["p50_ms"]
            if title == NOTHING.title:
                if "bwrap true" in table:
                    ratio = p50_ms / table["bwrap true"]["p50_ms"]
                    yield goal(way, "x bwrap running /bin/true", ratio, at_most=1.3)
                continue
            ratio = table["fresh python"]["p50_ms"] / p50_ms
            least = 40 if title == CALL.title else 100
            yield goal(way, "x faster than a fresh interpreter", ratio, at_least=least)
            ratio = p50_ms / table["bare fork"]["p50_ms"]
            yield goal(way, "x a bare fork of the same process", ratio, at_most=2.5)


async def run(args: argparse.Namespace, port: int, door: Path, stub_pid: int) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    subjects = [NOTHING, CALL]
    if args.agents_python:
        subjects.append(replace(AGENT, python=args.agents_python))
    for subject in subjects:
        rows = {}
        for name, way in ways(subject, port, door, args.num).items():
            num = max(4, args.num // 10) if name in SLOW else args.num
            rows[name] = await measure(way, num, stub_pid)
        show(subject.title, rows)
        tables[subject.title] = {name: row for name, row in rows.items() if isinstance(row, dict)}
    print("\n* than a fresh interpreter (`import openai`; in the later tables, and its first call)")
    for line in goals(tables):
        print(line)
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--num", type=int, default=100, help="children per way; slow ways a tenth")
    parser.add_argument("--agents-python", help="an interpreter that has openai-agents")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        door = Path(folder) / "door"
        with start("benchmarks.stub", str(door)) as stub:
            tables = asyncio.run(run(args, int(read_line(stub)), door, stub.pid))
            assert stub.stdin is not None
            stub.stdin.close()
    if args.json:
        args.json.write_text(json.dumps(tables, indent=2) + "\n")


if __name__ == "__main__":
    main()
