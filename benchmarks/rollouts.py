"""What a rollout costs beside its model calls, by how its agent is run.

    python -m benchmarks.rollouts [--num 256] [--at-once 32] [--json FILE]

Measures wall time and CPU (user + system, of all processes that the way uses) of `num` one-turn
rollouts against an engine stub that answers at once. Getting ready is measured apart, and so is
filling the reserve, which in one way is a child for each rollout. CPU is that of the whole process
tree (`tree`), before and after. The stub's time does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from benchmarks.tree import tree_cpu_s
from benchmarks.ways import WAYS

ROOT = Path(__file__).parents[1]
REFERENCE = "this pool"


@dataclass(frozen=True, slots=True)
class Cost:
    way: str
    ready_s: float  # wall time until a first rollout has run
    wall_s: float  # of all rollouts
    cpu_s: float  # of all rollouts
    note: str = ""


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise SystemExit(
            f"a process of the benchmark ended with {process.wait()}: {process.args!r}"
        )
    return line


def start(*words: str, python: str = sys.executable) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [python, "-m", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def measure(way: str, *, port: int, door: Path, num: int, at_once: int) -> Cost:
    started_at = time.monotonic()
    options = (f"--port={port}", f"--door={door}", f"--num={num}", f"--at-once={at_once}")
    with start("benchmarks.ways", way, *options) as process:
        assert process.stdin is not None
        note = read_line(process).removeprefix("ready").strip()
        ready_s = time.monotonic() - started_at
        root = psutil.Process(process.pid)
        before_s = tree_cpu_s(root)
        print(file=process.stdin, flush=True)
        wall_s = float(read_line(process))
        cpu_s = tree_cpu_s(root) - before_s
        process.stdin.close()
    return Cost(way, ready_s, wall_s, cpu_s, note)


def show(costs: list[Cost], num: int) -> None:
    reference = next((cost for cost in costs if cost.way == REFERENCE), costs[0])
    head = ("way", "ready s", "wall s", "rollouts/s", "CPU ms each", "wall ratio", "CPU ratio")
    print(("{:<28}" + "{:>12}" * 6).format(*head))
    for cost in costs:
        cells = (
            f"{cost.ready_s:.2f}",
            f"{cost.wall_s:.2f}",
            f"{num / cost.wall_s:.0f}",
            f"{1000 * cost.cpu_s / num:.1f}",
            f"{cost.wall_s / reference.wall_s:.2f}",
            f"{cost.cpu_s / reference.cpu_s:.2f}",
        )
        print(("{:<28}" + "{:>12}" * 6).format(cost.way, *cells))
        if cost.note:
            print(f"{'':<28}({cost.note}: {cost.ready_s:.0f} s before the clock started)")
    print(f"Ratios are to {reference.way!r}. Its children are isolated and killed; those of others")
    print("are not. ProcessPoolExecutor reuses its 4 workers, environment and memory included.")
    for line in goals({cost.way: cost for cost in costs}, num):
        print(line)


def goals(costs: Mapping[str, Cost], num: int) -> Iterator[str]:
    """What was aimed at, what it came to, and whether that is met; last, what bounds it."""
    shared, fresh = costs.get("inline, shared client"), costs.get("inline, fresh client each")
    for way in ("this pool", "this pool, standing ready", "bare fork each"):
        if way not in costs:
            continue
        wall_s = costs[way].wall_s
        if way == "bare fork each":
            way = "bare fork each (no sandbox that forks for each can do better)"
        if shared is not None:
            yield goal(way, "x the wall time of inline shared", wall_s / shared.wall_s, at_most=1.5)
        if fresh is not None:
            yield goal(way, "x faster than inline fresh", fresh.wall_s / wall_s, at_least=4)
        yield goal(way, "rollouts/s", num / wall_s, at_least=100)


def goal(
    way: str,
    what: str,
    value: float,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> str:
    if at_least is not None:
        bound, met = f">= {at_least:g}", value >= at_least
    else:
        assert at_most is not None
        bound, met = f"<= {at_most:g}", value <= at_most
    return f"goal {bound:>6} {what}: {value:.2f} {'met' if met else 'NOT met'}: {way}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--num", type=int, default=256, help="rollouts per way")
    parser.add_argument("--at-once", type=int, default=32, help="rollouts at a time")
    parser.add_argument("--way", action="append", choices=WAYS, help="only this one (repeatable)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        start("benchmarks.stub", f"{folder}/door") as stub,
    ):
        port, door = int(read_line(stub)), Path(folder) / "door"
        print(f"{args.num} one-turn rollouts, {args.at_once} at once, {os.cpu_count()} cores")
        costs = [
            measure(way, port=port, door=door, num=args.num, at_once=args.at_once)
            for way in args.way or WAYS
        ]
        assert stub.stdin is not None
        stub.stdin.close()
    show(costs, args.num)
    if args.json:
        args.json.write_text(json.dumps([asdict(cost) for cost in costs], indent=2) + "\n")


if __name__ == "__main__":
    main()
