"""Does a long run grow? 20,000 rollouts through all that stands between a task and a batch.

    python -m benchmarks.soak_rollouts [--num 20000] [--warm 2000]

A trainer's admission, attempts, stream and ledger (no model learns), the proxy, the supervisor, its
zygote and a child for each rollout, which makes one model call to a scripted engine. Prints the
resident memory of each process as it goes, its slope after the first `--warm` rollouts, and what is
left: descriptors, children's folders. Exits with 1 where memory grows by more than `--max-slope`
MiB per 1,000 rollouts, or where anything is left behind. Allocators take long to settle; one
session, or trajectory, that is kept for each rollout is several times the limit. Zygotes are
renewed after so many children: where two are there for a moment, their mean counts.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from areal_sub.checking.tokenizer import write_tokenizer
from areal_sub.config import Config, parse_config
from areal_sub.records import Fate
from areal_sub.rollout.attempt import Assignment
from areal_sub.rollout.failures import FailurePolicy
from areal_sub.rollout.groups import GroupSource
from areal_sub.rollout.staleness import Admission
from areal_sub.trainer.agents import agents_of
from areal_sub.trainer.ledger import Ledger
from areal_sub.trainer.scratch import scratch_folder
from areal_sub.trainer.wiring import Stack
from areal_sub.trajectory.accounting import account, judge_run
from areal_sub.trajectory.run_log import read_run
from areal_sub.trajectory.tree import Trajectory
from benchmarks.rollouts import ROOT

NUM_SAMPLES = 4
BATCH_SIZE = 8
SEGMENT_BYTES = 2 * 2**20
PARTS = {
    "proxy": "areal_sub.proxy",
    "supervisor": "areal_sub.rollout.supervisor",
    "zygote": "sandbox.zygote",
}


def agent(data: dict[str, Any]) -> float:
    """One model call, on a connection of its own, without the SDK's second of start-up."""
    import json
    import os
    import urllib.request

    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": data["q"]}]})
    request = urllib.request.Request(
        os.environ["OPENAI_BASE_URL"] + "/chat/completions",
        body.encode(),
        {
            "content-type": "application/json",
            "authorization": f"Bearer {os.environ['OPENAI_API_KEY']}",
        },
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return float(len(json.load(answer)["choices"]))


class Watch:
    """Resident memory of each part, by the number of rollouts that have ended."""

    def __init__(self) -> None:
        self._me = psutil.Process()
        self.samples: dict[str, list[tuple[int, float]]] = {}
        self.num_fds: dict[str, list[int]] = {}

    def processes(self) -> dict[str, list[psutil.Process]]:
        found: dict[str, list[psutil.Process]] = {"trainer": [self._me]}
        for process in self._me.children(recursive=True):
            try:
                words = process.cmdline()
                name = next((n for n, module in PARTS.items() if module in words), None)
                if name is None and process.parent() in found.get("supervisor", []):
                    name = "zygote"
            except psutil.Error:
                continue
            if name is not None:
                found.setdefault(name, []).append(process)
        return found

    def look(self, num: int) -> None:
        line = []
        for name, processes in self.processes().items():
            try:
                rss = sum(p.memory_info().rss for p in processes) / len(processes) / 2**20
                fds = sum(p.num_fds() for p in processes)
            except psutil.Error:  # a zygote was renewed meanwhile
                continue
            self.samples.setdefault(name, []).append((num, rss))
            self.num_fds.setdefault(name, []).append(fds)
            line.append(f"{name} {rss:7.1f} MiB {fds:4d} fds")
        print(f"{num:7d}  " + "   ".join(line), flush=True)

    def slopes(self, warm: int) -> dict[str, float]:
        """MiB per 1,000 rollouts, by least squares, after the first `warm`."""
        found = {}
        for name, samples in self.samples.items():
            after = [(num, rss) for num, rss in samples if num >= warm]
            if len(after) >= 3:
                x, y = np.array(after).T
                found[name] = float(np.polyfit(x, y, 1)[0] * 1000)
        return found


async def soak(config: Config, folder: Path, num: int, warm: int) -> tuple[Watch, list[str]]:
    agents, _ = agents_of(config, agent, say=print)
    journals = folder / "run" / "journal"
    journals.mkdir(parents=True)
    ledger = Ledger(journals / "0001.ledger", config, policy_version=0, tokenizer_path=str(folder))
    watch = Watch()
    num_ended = 0
    outcomes: Counter[str] = Counter()
    problems: list[str] = []
    async with Stack.start(
        config,
        model_path=str(folder),
        tokenizer_path=str(folder),
        policy_version=0,
        journal=journals / "0001.journal",
        logs=folder,
        engine=("areal_sub.checking.scripted_engine", {"script": ["fine"]}),
    ) as stack:
        await stack.guard(stack.warm(agents.agents))

        async def run(assignment: Assignment) -> Trajectory:
            return await stack.rollouts.run(assignment, agents.pick("g"), config.gconfig)

        def on_rollout(trajectory: Trajectory) -> None:
            nonlocal num_ended
            num_ended += 1
            outcomes[trajectory.end.outcome] += 1
            if num_ended % max(1, min(warm, 500)) == 0:
                watch.look(num_ended)

        source = GroupSource(
            lambda number: (f"task{number}", {"q": f"question {number}"}),
            run,
            Admission(
                batch_size=BATCH_SIZE,
                max_head_offpolicyness=1,
                max_concurrent_rollouts=config.rollout.max_concurrent_rollouts,
                num_samples=NUM_SAMPLES,
                keeps_stale=True,  # the scripted engine's version is always 0
            ),
            failures=FailurePolicy.of(config.rollout.failures),
            on_rollout=on_rollout,
            on_left_out=lambda t, fate: ledger.left_out(t, fate, version),
            max_pending_bytes=config.rollout.max_pending_bytes,
            running_bytes=lambda: stack.stream.num_bytes,
        )
        version = 0

        async def train() -> None:
            nonlocal version
            while num_ended < num:
                batch = await source.next_batch()
                for group in batch.groups:
                    for trajectory in group:
                        ledger.left_out(trajectory, Fate.NO_SIGNAL, version)
                version += 1
                offset = stack.stream.settle(ledger.take_decided())
                await stack.proxy.call("acknowledge", {"offset": offset}, timeout_s=60)
                source.set_version(version)
            await source.close()
            ledger.left(source.held_rollouts(), version)

        started_at = time.monotonic()
        await stack.guard(train())
        took_s = time.monotonic() - started_at
        print(
            f"{num_ended} rollouts in {took_s:.0f} s: {num_ended / took_s:.0f}/s, {dict(outcomes)}"
        )
        stats = await stack.proxy.call("stats", timeout_s=60)
        if stats["num_open"]:
            problems.append(f"{stats['num_open']} rollouts are open at the proxy")
        for name, fds in watch.num_fds.items():
            if max(fds[-2:]) > max(fds[: max(2, len(fds) // 4)]) + 32:
                problems.append(f"{name}: descriptors grew, from {fds[0]} to {fds[-1]}")
    ledger.close("done", "")
    size = sum(file.stat().st_size for file in (journals / "0001.journal").iterdir())
    print(f"journal: {size / 2**20:.1f} MiB left of it, retain_bytes {config.journal.retain_bytes}")
    if size > config.journal.retain_bytes + 2 * SEGMENT_BYTES:  # type: ignore[operator]
        problems.append("the journal is larger than journal.retain_bytes allows")
    attempts = read_run(journals)
    accounting = account(attempts, judge_run(attempts))
    print(f"accounted for: {accounting}")
    return watch, [*problems, *accounting.problems]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=20_000)
    parser.add_argument("--warm", type=int, default=2_000)
    parser.add_argument("--max-slope", type=float, default=1.0, help="MiB per 1,000 rollouts")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as around:
        tempfile.tempdir = around  # whatever is left behind is left here
        with scratch_folder(Path(around)) as folder:
            write_tokenizer(folder)
            words = [
                "experiment_name=soak",
                "trial_name=soak",
                f"actor.path={folder}",
                f"cluster.fileroot={folder / 'runs'}",
                f"gconfig.n_samples={NUM_SAMPLES}",
                "rollout.max_concurrent_rollouts=32",
                f"rollout.openai.python_path=[{ROOT}]",
                f"journal.segment_bytes={SEGMENT_BYTES}",
                f"journal.retain_bytes={4 * SEGMENT_BYTES}",
            ]
            watch, problems = asyncio.run(
                soak(parse_config(None, words), folder, args.num, args.warm)
            )
        left = [path.name for path in Path(around).iterdir()]
        if left:
            problems.append(f"left behind: {', '.join(sorted(left)[:8])}")
    for name, slope in sorted(watch.slopes(args.warm).items()):
        print(f"  {name:10}  {slope:+8.3f} MiB per 1,000 rollouts after {args.warm}")
        if slope > args.max_slope:
            problems.append(f"{name} grows by {slope:.2f} MiB per 1,000 rollouts")
    for problem in problems:
        print(f"PROBLEM: {problem}")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
