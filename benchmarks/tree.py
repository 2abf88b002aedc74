"""The CPU time of a process and of all below it, and when it uses none. Called by benchmarks."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil

STANDING_TIMEOUT_S = 300.0
STANDING_CORES = 0.1
"""What is no more than this stands: each child's init looks at what it uses twice a second."""


def tree_cpu_s(root: psutil.Process) -> float:
    """User and system time of `root`, its descendants, and those of them that were waited for."""
    total = 0.0
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # ended just now; its parent has its time
            total += _own_s(process) + sum(process.cpu_times()[2:4])
    return total


def _own_s(process: psutil.Process) -> float:
    """To the nanosecond where the kernel tells, which for hundreds of small processes matters:
    `cpu_times` counts whole hundredths."""
    total_ns = 0
    try:
        for thread in Path(f"/proc/{process.pid}/task").iterdir():
            total_ns += int((thread / "schedstat").read_text().split()[0])
    except OSError:
        total_ns = 0
    counted_s: float = sum(process.cpu_times()[:2])
    return max(total_ns / 1e9, counted_s)


async def until_standing(pid: int, all_there: Callable[[], Awaitable[bool]]) -> None:
    """Returns when `all_there` and what is below process `pid` uses next to no CPU: what stands
    ready has its pages by then, of which nobody tells."""
    root, cores = psutil.Process(pid), 1.0
    async with asyncio.timeout(STANDING_TIMEOUT_S):
        while cores > STANDING_CORES or not await all_there():
            before_s, began_at = tree_cpu_s(root), time.monotonic()
            await asyncio.sleep(0.3)
            cores = (tree_cpu_s(root) - before_s) / (time.monotonic() - began_at)
