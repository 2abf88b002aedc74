"""The stub case of `async.py`: the real controller over an engine and a learner that only wait.

Real: `GroupSource` with its admission rule and staleness, and the policy that is learned: one
softmax over `NUM_ANSWERS` answers for all tasks, sampled at the version that a rollout was begun
with, and moved by group-relative advantages. Modelled, as waits: how long a rollout samples and
how long the learner steps. The waits are those of a virtual clock, which jumps to the next event
as soon as nothing is ready: a run is the same on any machine, however busy, and takes seconds. So
the figures say nothing of how fast our engine or the controller's own code is; they show what the
controller's decisions do with long tails.

The engine decodes all running sequences together, token by token; with n of them a token takes
`(1 + n / 128)` times what it takes alone: memory-bound at first, then sharing the compute.

The lengths are log-normal with a median of 500 tokens and a 99th percentile of 5,000, as told of
reasoning rollouts (jiahuanglin.xyz, "Long-tail rollouts", 2026: "median ~500, p99 ~5000"), cut at
16,000 tokens. The learner takes a third of what a synchronous batch takes to sample: "rollout
dominates at 60-80 % of wall-clock" (ibid.).
"""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from areal_sub.learner.advantage import group_baselines
from areal_sub.records import EndRecord, Fate, Fork, OpenRecord, Outcome, TurnRecord, float32, int32
from areal_sub.rollout.attempt import Assignment
from areal_sub.rollout.groups import GroupSource
from areal_sub.rollout.staleness import Admission
from areal_sub.trajectory.tree import Trajectory

T = TypeVar("T")

MEDIAN_TOKENS = 500
SIGMA = math.log(10) / 2.326  # the 99th percentile is ten medians
MAX_TOKENS = 16_000
BATCH_SIZE = 16
NUM_SAMPLES = 8
TOKENS_PER_S = 60.0  # of a sequence alone
TICK_S = 0.5
NUM_ANSWERS = 16
RIGHT_ANSWER = 3
LEARNING_RATE = 0.25
REACHED = 0.8


@dataclass(frozen=True, slots=True)
class Outcomes:
    """One run to `num_updates` updates."""

    wall_s: float
    reward: float  # mean of the last five batches, or of fewer in a short run
    reached_s: float | None  # until the first five batches with a mean reward of `REACHED`
    num_dropped: int  # rollouts sampled and left out for their age
    mean_age: float  # staleness of what was trained


class VirtualClock(selectors.BaseSelector):
    """Waits by moving the clock. `run_virtually` makes an event loop of it."""

    def __init__(self) -> None:
        self._real = selectors.DefaultSelector()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = self._real.select(0)
        if not ready:
            if timeout is None:
                raise RuntimeError("everything waits, and nothing would end it")
            self.now_s += timeout
        return ready

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def get_map(self) -> Any:
        return self._real.get_map()

    def close(self) -> None:
        self._real.close()


def run_virtually(work: Coroutine[Any, Any, T]) -> T:
    clock = VirtualClock()
    loop = asyncio.SelectorEventLoop(clock)
    loop.time = lambda: clock.now_s  # type: ignore[method-assign]
    try:
        return loop.run_until_complete(work)
    finally:
        loop.close()


class StubEngine:
    """Decodes everything that runs."""

    def __init__(self) -> None:
        self._running: dict[asyncio.Future[None], float] = {}

    async def decode(self, num_tokens: float) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._running[done] = num_tokens
        try:
            await done
        finally:
            self._running.pop(done, None)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            step = TICK_S * TOKENS_PER_S / (1 + len(self._running) / 128)
            for done, left in list(self._running.items()):
                self._running[done] = left - step
                if left <= step and not done.done():
                    done.set_result(None)


@dataclass
class Bandit:
    """The policy. Version v has `history[v]` as its logits."""

    history: list[NDArray[np.float64]] = field(default_factory=lambda: [np.zeros(NUM_ANSWERS)])

    def sample(self, version: int, draw: float) -> tuple[int, float]:
        logits = self.history[version]
        p = np.exp(logits - logits.max())
        p /= p.sum()
        answer = min(int(np.searchsorted(np.cumsum(p), draw)), NUM_ANSWERS - 1)
        return answer, float(np.log(p[answer]))

    def learn(self, groups: list[list[tuple[int, float]]]) -> None:
        """REINFORCE with GRPO's advantages; `groups` of (answer, reward)."""
        logits = self.history[-1]
        p = np.exp(logits - logits.max())
        p /= p.sum()
        baselines = group_baselines([[r for _, r in g] for g in groups], "mean_std")
        gradient = np.zeros(NUM_ANSWERS)
        for group, baseline in zip(groups, baselines, strict=True):
            for answer, reward in group:
                advantage = float(baseline.advantages(float32([reward]))[0])
                gradient += advantage * (np.eye(NUM_ANSWERS)[answer] - p)
        self.history.append(logits + LEARNING_RATE * gradient / sum(map(len, groups)))


def _lengths(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
    lengths = MEDIAN_TOKENS * np.exp(SIGMA * rng.standard_normal(shape))
    return lengths.clip(max=MAX_TOKENS)


async def run(
    *,
    offpolicyness: int,
    num_updates: int,
    learning_s: float,
    seed: int,
    keeps_stale: bool = False,
) -> Outcomes:
    """One run to `num_updates` updates, each of which takes the learner `learning_s`."""
    clock = asyncio.get_running_loop()
    engine = StubEngine()
    bandit = Bandit()
    num_dropped = 0

    async def attempt(assignment: Assignment) -> Trajectory:
        # Drawn from the rollout's own name: each setting meets the same lengths.
        group, index = assignment.rollout_id.removeprefix("g").split("-")
        rng = np.random.default_rng([seed, int(group), int(index)])
        version = len(bandit.history) - 1
        answer, logprob = bandit.sample(version, rng.random())
        await engine.decode(float(_lengths(rng, (1,))[0]))
        return _trajectory(assignment, version, answer, logprob)

    def left_out(trajectory: Trajectory, fate: Fate) -> None:
        nonlocal num_dropped
        num_dropped += fate is Fate.STALE

    source = GroupSource(
        lambda number: (f"task{number}", {}),
        attempt,
        Admission(
            batch_size=BATCH_SIZE,
            max_head_offpolicyness=offpolicyness,
            max_concurrent_rollouts=BATCH_SIZE * NUM_SAMPLES * (offpolicyness + 1),
            num_samples=NUM_SAMPLES,
            keeps_stale=keeps_stale,
        ),
        on_rollout=lambda _: None,
        on_left_out=left_out,
    )
    decoding = asyncio.ensure_future(engine.run())
    rewards: list[float] = []
    reached_s = None
    ages: list[int] = []
    started_at = clock.time()
    for version in range(num_updates):
        batch = await source.next_batch()
        ages += [version - t.oldest_version for group in batch.groups for t in group]
        answered = [
            [(int(turn.token_ids[0]), float(t.reward)) for t in group for turn in t.turns.values()]
            for group in batch.groups
        ]
        await asyncio.sleep(learning_s)
        bandit.learn(answered)
        rewards.append(float(np.mean([reward for group in answered for _, reward in group])))
        if reached_s is None and len(rewards) >= 5 and np.mean(rewards[-5:]) >= REACHED:
            reached_s = clock.time() - started_at
        source.set_version(version + 1)
    wall_s = clock.time() - started_at
    await source.close()
    decoding.cancel()
    await asyncio.gather(decoding, return_exceptions=True)
    return Outcomes(
        wall_s, float(np.mean(rewards[-5:])), reached_s, num_dropped, float(np.mean(ages))
    )


def _trajectory(assignment: Assignment, version: int, answer: int, logprob: float) -> Trajectory:
    opened = OpenRecord(
        rollout_id=assignment.rollout_id,
        group_id=assignment.group_id,
        task_id=assignment.task_id,
        split=assignment.split,
        policy_version=assignment.policy_version,
        opened_at=0.0,
    )
    turn = TurnRecord(
        rollout_id=assignment.rollout_id,
        turn_id="t",
        parent_turn_id=None,
        fork=Fork.ROOT,
        context_token_ids=int32([0]),
        token_ids=int32([answer]),
        rollout_logprobs=float32([logprob]),
        versions=int32([version]),
        finish_reason="stop",
        dialect="chat",
        model="stub",
        temperature=1.0,
        top_p=1.0,
        started_at=0.0,
        ended_at=0.0,
        num_prompt_tokens=1,
    )
    end = EndRecord.without_process(
        assignment.rollout_id, Outcome.COMPLETED, reward=float(answer == RIGHT_ANSWER), num_turns=1
    )
    return Trajectory.build(opened, [turn], end)
