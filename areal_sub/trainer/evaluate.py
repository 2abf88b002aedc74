"""Runs the validation tasks once under the current policy."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from areal_sub.config.schema import GenerationConfig
from areal_sub.records import Outcome
from areal_sub.rollout.attempt import Assignment, RolloutRunner
from areal_sub.rollout.mix import AgentMix
from areal_sub.trainer.datasets import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A rollout that did not complete counts with reward 0: it did not solve its task. One whose
    grader failed, or that a process of ours was lost under, does not count."""

    mean_reward: float
    num_rollouts: int
    outcomes: Counter[Outcome]
    mean_by_agent: dict[str, float]  # empty where the run has one


async def evaluate(
    rollouts: RolloutRunner,
    agents: AgentMix,
    tasks: Sequence[Task],
    gconfig: GenerationConfig,
    *,
    version: int,
    max_concurrent_rollouts: int,
    on_start: Callable[[str], None],
) -> Evaluation:
    """`gconfig.n_samples` rollouts of each task; `on_start` gets the id of each.

    Raises `PeerGone`, `DeadlineExceeded`.
    """
    slots = asyncio.Semaphore(max_concurrent_rollouts)
    rewards: list[float] = []
    by_agent: dict[str, list[float]] = {}
    outcomes: Counter[Outcome] = Counter()

    async def one(number: int, task: Task, sample: int) -> None:
        group_id = f"v{version:06d}-{number:06d}"
        assignment = Assignment(
            rollout_id=f"{group_id}-{sample}",
            group_id=group_id,
            task_id=task.task_id,
            split="valid",
            data=task.data,
            policy_version=version,
        )
        # By the task: the same agent each time, so that evaluations can be compared.
        agent = agents.pick(f"valid-{number}")
        async with slots:
            on_start(assignment.rollout_id)
            trajectory = await rollouts.run(assignment, agent, gconfig)
        outcomes[trajectory.end.outcome] += 1
        if trajectory.end.outcome in (Outcome.GRADER_FAILED, Outcome.LOST):
            return
        completed = trajectory.end.outcome is Outcome.COMPLETED
        rewards.append(trajectory.reward if completed else 0.0)
        if agent.name:
            by_agent.setdefault(agent.name, []).append(rewards[-1])

    async with asyncio.TaskGroup() as running:
        for number, task in enumerate(tasks):
            for sample in range(gconfig.n_samples):
                running.create_task(one(number, task, sample))
    return Evaluation(
        mean_reward=sum(rewards) / max(1, len(rewards)),
        num_rollouts=len(rewards),
        outcomes=outcomes,
        mean_by_agent={name: sum(own) / len(own) for name, own in sorted(by_agent.items())},
    )
