"""Does anything grow? 10,000 children in sequence, 500 at once, and a caller that is killed.

    python -m benchmarks.soak [--num 10000] [--at-once 500] [--tier namespaces]

Counts, of this process and all below it: resident memory, descriptors, processes, mounts and
namespaces, after the first tenth and at the end. Exits with 1 where a count has grown, where memory
has grown by more than a tenth, or where the killed caller leaves anything behind.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from benchmarks.rollouts import ROOT
from sandbox import Ending, Limits, Sandbox, SandboxSpec
from sandbox.layers.environ import allowed
from sandbox.plan import strongest
from sandbox.probe import probe

TARGET = "benchmarks.first_call:nothing"
SETTLE_S = 20.0
STILL_S = 0.5
MEMORY_GROWTH = 1.1


@dataclass(frozen=True, slots=True)
class Count:
    rss_mb: float
    descriptors: int
    processes: int
    mounts: int
    namespaces: int


def count(above: psutil.Process) -> Count:
    """What `above` and everything below it hold now."""
    processes = [above, *above.children(recursive=True)]
    rss_bytes = descriptors = mounts = 0
    namespaces = set()
    for process in processes:
        rss_bytes += process.memory_info().rss
        descriptors += process.num_fds()
        with open(f"/proc/{process.pid}/mountinfo") as file:
            mounts += sum(1 for _ in file)
        namespaces |= {door.readlink() for door in Path(f"/proc/{process.pid}/ns").iterdir()}
    return Count(round(rss_bytes / 2**20, 1), descriptors, len(processes), mounts, len(namespaces))


async def settled(above: psutil.Process) -> Count:
    """The counts, once they stay the same: then the reserve is full, and what ended is gone."""
    deadline = time.monotonic() + SETTLE_S
    last: Count | None = None
    since = time.monotonic()
    while True:
        try:
            now: Count | None = count(above)
        except (psutil.Error, OSError):  # one ended while it was counted
            now = None
        if now is None or last is None or grown(last, now) or grown(now, last):
            since = time.monotonic()
        elif time.monotonic() - since > STILL_S:
            return now
        if now is not None and time.monotonic() > deadline:
            return now
        last = now
        await asyncio.sleep(0.1)


def grown(before: Count, after: Count) -> list[str]:
    """Names of what is more than it was."""
    names = [
        name
        for name, value in asdict(after).items()
        if name != "rss_mb" and value > getattr(before, name)
    ]
    return names + ["rss_mb"] * (after.rss_mb > before.rss_mb * MEMORY_GROWTH)


async def one(box: Sandbox) -> None:
    report = await box.run({})
    assert report.ending is Ending.RETURNED, report


async def soak(box: Sandbox, num: int, at_once: int) -> bool:
    me = psutil.Process()
    for _ in range(max(1, num // 10)):
        await one(box)
    before = await settled(me)
    started_at = time.monotonic()
    for _ in range(num - num // 10):
        await one(box)
    wall_s = time.monotonic() - started_at
    after = await settled(me)
    show(f"after {num // 10}", before)
    show(f"after {num}", after, f"{(num - num // 10) / wall_s:.0f}/s")

    started_at = time.monotonic()
    await asyncio.gather(*(one(box) for _ in range(at_once)))
    wall_s = time.monotonic() - started_at
    # Buffers of this process may stay as large as the crowd was; nothing else may.
    crowd = await settled(me)
    show(f"after {at_once} at once", crowd, f"{at_once / wall_s:.0f}/s")
    more = {*grown(before, after), *(name for name in grown(before, crowd) if name != "rss_mb")}
    if more:
        print(f"GREW: {', '.join(sorted(more))}")
    return not more


def show(label: str, counts: Count, rate: str = "") -> None:
    fields = "".join(f"{value:>12}" for value in asdict(counts).values())
    print(f"{label:<18}{fields}  {rate}", flush=True)


async def hold(tier: str, at_once: int) -> None:
    """As the caller to be killed: `at_once` children that sleep; says so when all of them run."""
    running = asyncio.Semaphore(0)

    def on_output(_fd: int, _chunk: bytes) -> None:
        running.release()

    spec = SandboxSpec(tier=tier, env=allowed(os.environ))
    async with Sandbox(spec) as box:
        children = [
            asyncio.ensure_future(box.execute(["sh", "-c", "echo; sleep 600"], on_output=on_output))
            for _ in range(at_once)
        ]
        for _ in children:
            await running.acquire()
        print("holding", flush=True)
        await asyncio.gather(*children)


def kill_caller(tier: str, at_once: int) -> bool:
    """SIGKILL a process with `at_once` running children: everything below it has to go."""
    argv = [sys.executable, "-m", "benchmarks.soak", "--tier", tier, "--hold", str(at_once)]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        if caller.stdout.readline() != "holding\n":
            print("the caller to be killed did not come up")
            return False
        below = psutil.Process(caller.pid).children(recursive=True)
        started_at = time.monotonic()
        caller.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(below, timeout=60)
    took_s = time.monotonic() - started_at
    print(f"caller killed with {len(below)} processes below it: {len(alive)} left, {took_s:.1f} s")
    return not alive


async def main(tier: str, num: int, at_once: int) -> bool:
    spec = SandboxSpec(tier=tier, env=allowed(os.environ), limits=Limits(wall_s=600))
    print(f"tier {tier}")
    names = "".join(f"{name:>12}" for name in Count.__slots__)
    print(f"{'':<18}{names}")
    async with Sandbox(spec, target=TARGET, python_path=[str(ROOT)], reserve=4) as box:
        return await soak(box, num, at_once)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=10_000, help="children in sequence")
    parser.add_argument("--at-once", type=int, default=500)
    parser.add_argument("--tier", default="auto")
    parser.add_argument("--hold", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    chosen = strongest(probe()) if args.tier == "auto" else args.tier
    if args.hold:
        asyncio.run(hold(chosen, args.hold))
    else:
        fine = asyncio.run(main(chosen, args.num, args.at_once))
        fine = kill_caller(chosen, min(args.at_once, 200)) and fine
        sys.exit(0 if fine else 1)
