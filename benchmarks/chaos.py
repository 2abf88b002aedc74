"""`make chaos`: whole runs of real processes, killed at random, in every phase. Is anything lost?

    python -m benchmarks.chaos --kills 100 --runs 5 --seed 1

Each run trains a tiny policy of random weights on a stub of a task. SIGKILL (and now and then
SIGSTOP, a hang) goes to its trainer, engine, proxy, supervisor, to a zygote or a child of it, while
the run is in a phase that was drawn for it: learning, updating weights, writing a recovery point,
waiting for rollouts, or after a random time. What is killed when is drawn from the seed. A killed
trainer is started again. At its end each run is stopped and finished by one last start.

Exits with 1 where a finished rollout was lost, one was trained twice, a process, a cgroup, a
mount or a folder was left behind, a run did not go on, or its rollouts are not accounted for.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from areal_sub.errors import ArealSubError
from areal_sub.records import Fate, Outcome
from areal_sub.rpc import Client
from areal_sub.trajectory.accounting import Judgement, account, judge_run
from areal_sub.trajectory.run_log import AttemptLog, read_run

REPO = Path(__file__).resolve().parents[1]
MODULES = {
    "engine": "areal_sub.engines.embedded",
    "proxy": "areal_sub.proxy",
    "supervisor": "areal_sub.rollout.supervisor",
}
# What is killed, how often by comparison, and in which phases of the trainer.
VICTIMS = {"trainer": 2, "engine": 4, "proxy": 4, "supervisor": 4, "zygote": 3, "child": 3}
PHASES = ("any", "waiting for rollouts", "learning", "updating weights", "saving a recovery point")
STOPPABLE = ("engine", "proxy", "supervisor")
HANGS = 0.15  # share of the kills of those that are a hang instead of an end
HEARTBEAT_S = 4.0
MAX_DELAY_S = 1.0
PHASE_WAIT_S = 20.0
GO_ON_S = 240.0
CONFIG = """
experiment_name: chaos
trial_name: run
workflow: benchmarks.chaos_agent.two_turns
rollout:
  max_concurrent_rollouts: 8
  timeout_s: 60.0
  setup_timeout_s: 240.0
  failures: {retries: {lost: 20, start_failed: 20, grader_failed: 1}}
gconfig: {n_samples: 4, max_new_tokens: 4}
actor: {path: set-below, dtype: float32, optimizer: {lr: 1e-3}}
engine: {max_running_requests: 16}
train_dataset: {path: set-below, batch_size: 2}
recover: {mode: auto, freq_steps: 1}
scheduler: {max_restarts: 1000}
stats_logger: {tensorboard: false, plot: false}
"""


@dataclass
class Tally:
    """What came of all runs."""

    kills: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    noticed_s: list[tuple[float, str]] = field(default_factory=list)
    num_finished: int = 0
    num_trained: int = 0
    lost: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return not (self.lost or self.twice or self.left or self.problems)


class Run:
    """One run's folder, over all of its trainers."""

    def __init__(self, folder: Path, policy: Path, *, heartbeat_s: float) -> None:
        self.folder = folder
        self.root = folder / "runs" / "chaos" / "run"
        self.output = folder / "output.txt"
        self._policy = policy
        self._heartbeat_s = heartbeat_s
        self._seen: dict[int, psutil.Process] = {}
        self._shared: set[Path] = set()  # its trainers' folders in shared memory
        config = folder / "config.yaml"
        config.write_text(CONFIG)
        tasks = "".join(json.dumps({"question": f"What is {n} + 1?"}) + "\n" for n in range(1, 5))
        (folder / "tasks.jsonl").write_text(tasks)
        self.trainer = self._start()

    def _start(self, **overrides: Any) -> subprocess.Popen[bytes]:
        command = [
            *(sys.executable, "-m", "areal_sub", "train"),
            *("--config", str(self.folder / "config.yaml")),
            f"cluster.fileroot={self.folder / 'runs'}",
            f"actor.path={self._policy}",
            f"train_dataset.path={self.folder / 'tasks.jsonl'}",
            f"deadlines.heartbeat_s={self._heartbeat_s}",
            *(f"{key}={value}" for key, value in {"total_train_steps": 10**6, **overrides}.items()),
        ]
        env = {**os.environ, "TMPDIR": str(self.folder), "COLUMNS": "200"}
        with self.output.open("ab") as output:
            return subprocess.Popen(command, cwd=REPO, env=env, stdout=output, stderr=output)

    def start_again(self, **overrides: Any) -> None:
        self.trainer = self._start(**overrides)

    @property
    def step(self) -> int:
        """The last step that is in the metrics."""
        path = self.root / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def incidents(self) -> list[dict[str, Any]]:
        path = self.root / "incidents.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def family(self) -> dict[str, list[psutil.Process]]:
        """The run's processes by what they are, remembered for `survivors`."""
        found: dict[str, list[psutil.Process]] = {}
        try:
            children = psutil.Process(self.trainer.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return found
        self._shared |= shared_folders(self.trainer.pid)
        for process in children:
            self._seen[process.pid] = process
            try:
                command, below = process.cmdline(), process.children()
            except psutil.NoSuchProcess:
                continue
            for name, module in MODULES.items():
                if module in command:
                    found.setdefault(name, []).append(process)
            if any(word.startswith("sandbox") or "sandbox/" in word for word in command):
                found.setdefault("zygote" if below else "child", []).append(process)
        return found

    def survivors(self) -> list[str]:
        alive = []
        for process in self._seen.values():
            try:
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    alive.append(f"process {process.pid} {' '.join(process.cmdline())[:120]}")
            except psutil.NoSuchProcess:
                continue
        return alive

    def leftovers(self) -> list[str]:
        """What is not a process, once all is over."""
        found = [f"folder {path}" for path in self.folder.glob("areal-sub-*")]
        found += [f"folder {path}" for path in self._shared if path.exists()]
        mounts = Path("/proc/self/mounts").read_text().splitlines()
        found += [f"mount {line}" for line in mounts if str(self.folder) in line]
        for group, _, _ in os.walk("/sys/fs/cgroup"):
            maker = re.fullmatch(r"sandbox-([0-9]+)-[0-9]+", Path(group).name)
            if maker and int(maker[1]) in self._seen:
                found.append(f"cgroup {group}")
        return found

    def doing(self) -> str:
        """The trainer's phase, as it says; "" where it does not."""

        async def ask() -> str:
            client = Client(Path(folder) / "trainer.sock", peer="trainer", redials=True)
            try:
                return str((await client.call("status", timeout_s=1.0))["doing"])
            finally:
                await client.close()

        try:
            folder = (self.root / "sockets").read_text().strip()
            return asyncio.run(ask())
        except (ArealSubError, OSError):
            return ""


def shared_folders(pid: int) -> set[Path]:
    """In shared memory, which the process has open."""
    found = set()
    with contextlib.suppress(OSError):  # it has ended
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(descriptor.readlink())
    return {path for path in found if path.match("/dev/shm/areal-sub-*")}


def until(condition: Callable[[], Any], limit_s: float, pause_s: float = 0.02) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
    return True


class Chaos:
    def __init__(self, seed: int, tally: Tally, *, heartbeat_s: float, hangs: float) -> None:
        self._hangs = hangs
        self._random = random.Random(seed)
        self._tally = tally
        self._heartbeat_s = heartbeat_s

    def run(self, folder: Path, policy: Path, victims: list[str]) -> None:
        run = Run(folder, policy, heartbeat_s=self._heartbeat_s)
        try:
            self._expect_steps(run, "the start")
            for victim in victims:
                self._kill(run, victim)
            self._finish(run)
        except ChaosFailed as failed:  # what such a run leaves says nothing
            self._tally.problems.append(f"{folder}: {failed}")
        finally:
            if run.trainer.poll() is None:
                run.trainer.kill()
                run.trainer.wait()
            if not until(lambda: not run.survivors(), 30.0):
                self._tally.left += run.survivors()
        self._judge(run)

    def _kill(self, run: Run, victim: str) -> None:
        phase = self._random.choice(PHASES)
        delay_s = self._random.uniform(0, MAX_DELAY_S) if phase == "any" else 0.0
        hangs = victim in STOPPABLE and self._random.random() < self._hangs
        time.sleep(delay_s)
        if phase != "any" and not until(lambda: run.doing() == phase, PHASE_WAIT_S, 0.0):
            phase = "any"
        candidates: list[psutil.Process] = []

        def found() -> bool:  # it may be about to be started again
            candidates[:] = run.family().get(victim, [])
            return bool(candidates) or victim == "trainer"

        if not until(found, GO_ON_S, 0.1):
            raise ChaosFailed(f"there is no {victim} to kill")
        num_incidents = len(run.incidents())
        step = run.step
        if victim == "trainer":
            run.trainer.kill()
        else:
            chosen = self._random.choice(candidates)
            with contextlib.suppress(psutil.NoSuchProcess):  # a child that had just ended
                chosen.send_signal(signal.SIGSTOP if hangs else signal.SIGKILL)
        at, monotonic = time.time(), time.monotonic()
        name = f"{victim}{' (hangs)' if hangs else ''}"
        self._tally.kills[name] += 1
        self._tally.phases[phase] += 1
        what = f"the kill of the {name} while {phase}"
        if victim == "trainer":
            run.trainer.wait()
            if not until(lambda: not run.survivors(), 30.0):
                raise ChaosFailed(f"after {what} there are still: {run.survivors()[:3]}")
            self._tally.noticed_s.append((time.monotonic() - monotonic, name))
            run.start_again()
        elif victim in MODULES:

            def noticed() -> list[float]:
                new = run.incidents()[num_incidents:]
                return [each["noticed_at"] for each in new if each["component"] == victim]

            if not until(noticed, GO_ON_S):
                raise ChaosFailed(f"nobody noticed {what}")
            self._tally.noticed_s.append((noticed()[0] - at, name))
        self._expect_steps(run, what, step)

    def _expect_steps(self, run: Run, what: str, step: int = 0) -> None:
        """One more step, at least."""
        if not until(lambda: run.step > step or run.trainer.poll() is not None, GO_ON_S, 0.05):
            raise ChaosFailed(f"no step after {what} in {GO_ON_S:g} s")
        if run.trainer.poll() is not None:
            raise ChaosFailed(f"the run ended after {what}, with {run.trainer.returncode}")

    def _finish(self, run: Run) -> None:
        """Stop it, then go on for two more steps to a regular end."""
        run.family()
        run.trainer.terminate()
        if not until(lambda: run.trainer.poll() is not None, GO_ON_S):
            raise ChaosFailed("it does not end by SIGTERM")
        run.start_again(total_train_steps=run.step + 2)

        def ended() -> bool:
            run.family()  # remembers them
            return run.trainer.poll() is not None

        until(ended, GO_ON_S, 0.2)
        if run.trainer.poll() != 0:
            raise ChaosFailed(f"its last start did not end well: {run.trainer.returncode}")

    def _judge(self, run: Run) -> None:
        """By the run's own records, and by what it left."""
        tally, where = self._tally, run.folder.name
        attempts = read_run(run.root / "journal")
        judgements = judge_run(attempts)
        tally.problems += [f"{where}: {p}" for p in account(attempts, judgements).problems]
        tally.num_finished += sum(is_finished(judgement) for judgement in judgements)
        tally.num_trained += sum(judgement.fate is Fate.TRAINED for judgement in judgements)
        last = attempts[-1].number
        tally.lost += [f"{where}: {name(j)} {j.label}" for j in judgements if is_lost(j, last)]
        tally.twice += [f"{where}: {each}" for each in trained_twice(attempts)]
        tally.left += run.leftovers()


class ChaosFailed(Exception):
    pass


def name(judgement: Judgement) -> str:
    return f"attempt {judgement.attempt.number}, {judgement.rollout.opened.rollout_id}"


def is_finished(judgement: Judgement) -> bool:
    end = judgement.rollout.end
    is_train = judgement.rollout.opened.split == "train"
    return end is not None and end.outcome is Outcome.COMPLETED and is_train


def is_lost(judgement: Judgement, last: int) -> bool:
    """It finished, and no trainer up to the attempt `last`, which came to its end, used it or said
    why not. What the last one has left over was on its way to a step beyond the run's end."""
    is_open = judgement.fate in (Fate.CRASHED, Fate.UNUSED, Fate.UNDONE)
    return is_finished(judgement) and is_open and judgement.attempt.number < last


def trained_twice(attempts: list[AttemptLog]) -> list[str]:
    """Rollouts that went into two steps of the policy that there is at the end."""
    found: list[str] = []
    for attempt in attempts:
        for rollout_id, log in attempt.rollouts.items():
            steps = [d.step for d in log.decisions if d.fate is Fate.TRAINED]
            if len(steps) > 1:
                found.append(f"attempt {attempt.number}, {rollout_id}: steps {steps}")
    return found


def draw(num_kills: int, seed: int) -> list[str]:
    """Each kind in its share (few kills: one after the other), in random order."""
    order = [victim for victim, share in VICTIMS.items() for _ in range(share)]
    kinds = order if num_kills >= len(order) else list(VICTIMS)
    victims = [kinds[number % len(kinds)] for number in range(num_kills)]
    random.Random(seed).shuffle(victims)
    return victims


def make_policy(folder: Path) -> None:
    code = (
        "import sys, random, torch\n"
        "from examples.proxy.warm_start import new_model, train_tokenizer\n"
        "torch.manual_seed(0)\n"
        "tokenizer = train_tokenizer(random.Random(0))\n"
        "new_model(tokenizer).save_pretrained(sys.argv[1])\n"
        "tokenizer.save_pretrained(sys.argv[1])\n"
    )
    command = [sys.executable, "-c", code, str(folder)]
    subprocess.run(command, check=True, cwd=REPO, stderr=subprocess.DEVNULL)


def report(tally: Tally, elapsed_s: float) -> None:
    def line(label: str, value: object) -> None:
        print(f"{label:34} {value}", flush=True)

    def counts(counter: Counter[str]) -> str:
        return ", ".join(f"{number} {what}" for what, number in sorted(counter.items()))

    line("kills", f"{tally.kills.total()} in {elapsed_s:.0f} s: {counts(tally.kills)}")
    line("phases of the trainer", counts(tally.phases))
    line("rollouts finished / trained", f"{tally.num_finished} / {tally.num_trained}")
    line("finished rollouts lost", len(tally.lost))
    line("rollouts trained twice", len(tally.twice))
    line("orphans left", len(tally.left))
    by_name: dict[str, float] = {}
    for seconds, victim in tally.noticed_s:
        by_name[victim] = max(seconds, by_name.get(victim, 0.0))
    line("longest time to notice", ", ".join(f"{v} {s:.2f} s" for v, s in sorted(by_name.items())))
    for what in (tally.lost, tally.twice, tally.left, tally.problems):
        for each in what[:20]:
            line("  FAILED", each)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--policy", type=Path, help="a model folder, instead of making one")
    parser.add_argument("--heartbeat", type=float, default=HEARTBEAT_S, help="seconds")
    parser.add_argument("--hangs", type=float, default=HANGS, help="share of kills that only stop")
    parser.add_argument("--keep", action="store_true", help="leave the runs' folders")
    arguments = parser.parse_args()
    started_at = time.monotonic()
    tally = Tally()
    # Short: paths of Unix sockets may have 107 bytes at most.
    folder = Path(tempfile.mkdtemp(prefix="as-chaos-"))
    policy = arguments.policy or folder / "policy"
    if arguments.policy is None:
        make_policy(policy)
    victims = draw(arguments.kills, arguments.seed)
    for number in range(arguments.runs):
        own = folder / f"{number}"
        own.mkdir()
        chaos = Chaos(
            arguments.seed + number,
            tally,
            heartbeat_s=arguments.heartbeat,
            hangs=arguments.hangs,
        )
        chaos.run(own, policy, victims[number :: arguments.runs])
        print(f"run {number + 1} of {arguments.runs}: {tally.kills.total()} kills", flush=True)
    report(tally, time.monotonic() - started_at)
    if tally.is_good and not arguments.keep:
        shutil.rmtree(folder)
    else:
        print(f"the runs' folders: {folder}")
    return int(not tally.is_good)


if __name__ == "__main__":
    sys.exit(main())
