"""The main flow of a run.

    tasks ─► GroupSource ─► children ─► proxy ─► engine          (always going on)
                 │ next_batch                      ▲
                 ▼                                 │ update_weights
              learner (a thread) ── step ──────────┘
                 │
                 └─► metrics, evaluation, checkpoints, recovery points

Who waits for whom. The loop waits for a batch (unblocked by rollouts ending; each has a deadline),
for the learner's thread, for the engine to take new weights (deadline), and for evaluation.
Rollouts never wait for the loop, except that no new group starts once the policy would be more than
`max_head_offpolicyness` versions behind at the time it is trained on (`rollout/staleness.py`).
Everything runs under `Stack.guard`: a process that ends is started again beneath these waits, and
ends every one of them where that fails too often (`wiring`).

Policy version v is the policy after v steps; step v+1 trains version v into v+1.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

from areal_sub.config import Config
from areal_sub.config.schema import GenerationConfig, RolloutConfig
from areal_sub.errors import DeadlineExceeded
from areal_sub.learner.checkpoint import save_recovery
from areal_sub.learner.learner import Learner
from areal_sub.rollout.attempt import Assignment
from areal_sub.rollout.failures import FailurePolicy
from areal_sub.rollout.groups import Batch, GroupSource
from areal_sub.rollout.mix import AgentMix
from areal_sub.rollout.staleness import Admission
from areal_sub.trainer.begun import TASKS_DIGEST
from areal_sub.trainer.checkpoints import FINAL, save_checkpoint, step_name
from areal_sub.trainer.datasets import Task, TaskOrder
from areal_sub.trainer.evaluate import Evaluation, evaluate
from areal_sub.trainer.exactness import Exactness, certify
from areal_sub.trainer.ledger import Ledger, learned
from areal_sub.trainer.metrics import MetricsLog
from areal_sub.trainer.offline import RecordedGroups
from areal_sub.trainer.progress import Grading, Progress
from areal_sub.trainer.run_dir import RunDir
from areal_sub.trainer.schedule import Every
from areal_sub.trainer.wiring import Stack
from areal_sub.trajectory.resume import Finished, RunPosition
from areal_sub.trajectory.samples import RolloutSamples, rollout_samples
from areal_sub.trajectory.tree import Trajectory
from areal_sub.waits import uninterrupted, within

T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is trained on: agents and tasks."""

    agents: AgentMix
    eval_agents: AgentMix
    tasks: Sequence[Task]
    valid_tasks: Sequence[Task]
    tokenizer_path: str
    num_steps: int
    tasks_digest: str


class TrainLoop:
    """One run. `first_step` is 1, or one past the recovered version."""

    def __init__(
        self,
        config: Config,
        workload: Workload,
        run: RunDir,
        stack: Stack,
        learner: Learner,
        learner_thread: ThreadPoolExecutor,
        metrics: MetricsLog,
        progress: Progress,
        ledger: Ledger,
        *,
        position: RunPosition,
        finished: Finished,
        recorded: RecordedGroups | None = None,
    ) -> None:
        self._config = config
        self._deadlines = config.deadlines
        self._workload = workload
        self._run = run
        self._stack = stack
        self._learner = learner
        self._thread = learner_thread
        self._metrics = metrics
        self._progress = progress
        self._ledger = ledger
        self._version = position.version
        # Rollouts of the batch or the evaluation that goes on, with the attempt that ran them.
        self._undecided: list[tuple[str, int]] = []
        self._recorded = recorded
        self._source = self._make_source(position, finished)
        progress.queues = self._source.queues
        self._eval_due = Every(config.evaluator)
        self._save_due = Every(config.saver)
        self._recover_due = Every(config.recover)

    async def train(self) -> None:
        """Take all remaining steps. Raises what ended a process of ours."""
        try:
            if self._config.actor.lora is not None:
                await self._update_weights(self._version)  # it began with the adapter's base
            first = self._config.evaluator.eval_before_train and self._version == 0
            if first and self._workload.valid_tasks:
                self._metrics.write(0, await self._evaluate())
            for step in range(self._version + 1, self._workload.num_steps + 1):
                await self._step(step)
            await self._drain()
            await self._look_at_rewards()  # what ended since the last step, too
        finally:
            await uninterrupted(self._finish())

    async def _step(self, step: int) -> None:
        started_at = time.monotonic()
        self._progress.now("waiting for rollouts")
        batch = await self._source.next_batch()
        waited_until = time.monotonic()

        self._progress.now("learning")
        self._undecided = [(t.open.rollout_id, t.attempt) for group in batch.groups for t in group]
        groups = [[(t, *self._samples(t)) for t in group] for group in batch.groups]
        samples = [[samples for _, samples, _ in group] for group in groups]
        stats = await self._in_thread(
            "a training step", self._deadlines.learn_s, self._learner.step, samples
        )
        all_skipped = stats.num_skipped_steps == stats.num_optimizer_steps
        for record in learned(groups, self._config, step=step, all_skipped=all_skipped):
            self._ledger.decided(record)
        self._undecided = []
        learned_at = time.monotonic()

        self._progress.now("updating weights")
        await self._update_weights(step)
        updated_at = time.monotonic()

        row = {
            **_batch_stats(batch, self._config.rollout, version=step - 1),
            **{f"learner/{name}": value for name, value in asdict(stats).items()},
            **self._progress.exactness.metrics(),
            "time/wait_s": waited_until - started_at,
            "time/learn_s": learned_at - waited_until,
            "time/update_s": updated_at - learned_at,
        }
        epoch = self._source.num_done // len(self._workload.tasks)
        last = step == self._workload.num_steps
        if self._workload.valid_tasks and (self._eval_due(step, epoch) or last):
            row |= await self._evaluate()
        row |= await self._look_at_rewards()
        row |= {f"fate/{fate}": count for fate, count in self._ledger.take_counts().items()}
        row["time/step_s"] = time.monotonic() - started_at
        row["rate/rollouts_per_s"] = row["batch/num_rollouts"] / row["time/step_s"]
        row["rate/tokens_per_s"] = row["batch/num_sampled_tokens"] / row["time/step_s"]
        self._metrics.write(step, row)
        self._progress.step = step
        self._progress.num_stale += batch.num_stale
        self._progress.rows = self._metrics.rows
        if self._save_due(step, epoch):
            self._progress.now("saving a checkpoint")
            await self._save(step_name(step))
        if self._config.recover.mode != "auto":
            await self._acknowledge(self._ledger.take_decided())
        elif self._recover_due(step, epoch) or last:
            self._progress.now("saving a recovery point")
            # What is decided on now is what the point has done with: no more, no less.
            decided = self._ledger.take_decided()
            await self._save_recovery(self._source.position)
            await self._acknowledge(decided)
        if last:
            await self._save(FINAL)
        self._progress.now("done" if last else "waiting for rollouts")

    async def _finish(self) -> None:
        """Every rollout has its end record and its decision when this returns."""
        await self._drain()
        self._ledger.left([*self._undecided, *self._source.held_rollouts()], self._version)

    async def _drain(self) -> None:
        """Stop what still runs, with a whole record of it. Who takes longer is left behind."""
        try:
            await within(self._deadlines.drain_s, self._source.close(), "the drain of rollouts")
        except DeadlineExceeded as error:
            log.warning("%s: the run ends without them", error)

    def _make_source(self, position: RunPosition, finished: Finished) -> GroupSource:
        config = self._config
        assert config.train_dataset is not None
        admission = Admission(
            batch_size=config.train_dataset.batch_size,
            max_head_offpolicyness=config.rollout.max_head_offpolicyness,
            max_concurrent_rollouts=config.rollout.max_concurrent_rollouts,
            num_samples=config.gconfig.n_samples,
            keeps_stale=config.rollout.over_stale == "reweight" or self._recorded is not None,
        )
        failures = FailurePolicy.of(config.rollout.failures)
        if self._recorded is not None:  # it would end in the same way again
            failures = dataclasses.replace(failures, retries={}, incomplete_groups="survivors")
        order = TaskOrder(
            len(self._workload.tasks),
            seed=config.seed,
            shuffle=config.train_dataset.shuffle,
        )

        def task(number: int) -> tuple[str, dict[str, Any]]:
            if self._recorded is not None:
                return self._recorded.task_id(number), {}
            chosen = self._workload.tasks[order[number]]
            return chosen.task_id, chosen.data

        async def run(assignment: Assignment) -> Trajectory:
            if self._recorded is not None:
                return await self._stack.rollouts.run_recorded(
                    assignment.rollout_id, self._recorded.records(assignment)
                )
            agent = self._workload.agents.pick(assignment.group_id)
            return await self._stack.rollouts.run(assignment, agent, config.gconfig)

        return GroupSource(
            task,
            run,
            admission,
            position=position,
            finished=finished,
            failures=failures,
            max_pending_bytes=config.rollout.max_pending_bytes,
            running_bytes=lambda: self._stack.stream.num_bytes,
            on_rollout=self._progress.saw,
            on_left_out=lambda t, fate: self._ledger.left_out(t, fate, self._version),
            on_given_up=lambda rollout_id: self._ledger.given_up(rollout_id, self._version),
        )

    def _samples(self, trajectory: Trajectory) -> tuple[RolloutSamples, Exactness]:
        openai = self._config.rollout.openai
        samples = rollout_samples(
            trajectory,
            export_style=openai.export_style,
            turn_discount=openai.turn_discount,
            credit=openai.credit,
        )
        samples, exactness = certify(trajectory, samples)
        self._progress.exactness += exactness
        return samples, exactness

    async def _update_weights(self, version: int) -> None:
        """Export, load between two decode steps of the engine, and let admission go on."""
        path = self._stack.weights_folder / f"v{version}.safetensors"
        dtype = self._config.engine.dtype or self._config.actor.dtype
        limit_s = self._deadlines.weight_update_s
        export = self._learner.export_weights
        if self._config.actor.lora is not None and self._config.engine.type == "vllm":
            export = self._learner.export_adapter
        await self._in_thread("exporting the weights", limit_s, export, path, dtype)
        await self._stack.update_weights(path, version, timeout_s=limit_s)
        self._version = version
        self._source.set_version(version)

    async def _evaluate(self) -> dict[str, float]:
        self._progress.now("evaluating")
        result: Evaluation = await evaluate(
            self._stack.rollouts,
            self._workload.eval_agents,
            self._workload.valid_tasks,
            self._config.eval_gconfig or _one_sample(self._config.gconfig),
            version=self._version,
            max_concurrent_rollouts=self._config.rollout.max_concurrent_rollouts,
            on_start=lambda rollout_id: self._undecided.append((rollout_id, 0)),
        )
        self._ledger.evaluated([rollout_id for rollout_id, _ in self._undecided], self._version)
        self._undecided = []
        return {
            "reward/valid": result.mean_reward,
            "valid/num_rollouts": result.num_rollouts,
            **{f"reward/valid/{name}": mean for name, mean in result.mean_by_agent.items()},
        }

    async def _look_at_rewards(self) -> dict[str, float]:
        """What the grader did and what looked like cheating, since the run began or went on."""
        stats = await self._stack.proxy.call(
            "stats", timeout_s=self._deadlines.control_s, idempotent=True
        )
        tampering = stats["tampering"]
        self._progress.tampering = tampering["counts"]
        self._progress.tampering_examples = tampering["examples"]
        row = {f"tampering/{sign}": float(count) for sign, count in tampering["counts"].items()}
        grader = self._stack.rollouts.grader
        if grader is not None:
            self._progress.grading = Grading(
                name=grader.name,
                num_graded=grader.num_graded,
                num_retried=grader.num_retried,
                num_failed=grader.num_failed,
            )
            row["grader/num_graded"] = grader.num_graded
            row["grader/num_retried"] = grader.num_retried
            row["grader/num_failed"] = grader.num_failed
        return row

    async def _acknowledge(self, decided: Sequence[str]) -> None:
        """These rollouts are done with for good: the journal may let go of them."""
        offset = self._stack.stream.settle(decided)
        await self._stack.proxy.call(
            "acknowledge",
            {"offset": offset},
            timeout_s=self._deadlines.control_s,
            idempotent=True,
        )

    async def _save(self, name: str) -> None:
        await self._in_thread(
            "writing a checkpoint",
            self._deadlines.checkpoint_s,
            save_checkpoint,
            self._learner,
            self._run.checkpoints,
            name,
            tokenizer_path=self._workload.tokenizer_path,
            keep=self._config.saver.keep,
        )

    async def _save_recovery(self, position: RunPosition) -> None:
        await self._in_thread(
            "writing a recovery point",
            self._deadlines.checkpoint_s,
            save_recovery,
            self._run.recover,
            self._learner,
            {**position.to_map(), TASKS_DIGEST: self._workload.tasks_digest},
        )

    async def _in_thread(
        self, what: str, limit_s: float, work: Callable[..., T], *args: Any, **kwargs: Any
    ) -> T:
        """Learner work has a thread of its own, so that rollouts go on meanwhile.

        Raises `DeadlineExceeded`; the thread cannot be stopped, and ends with the process.
        """
        loop = asyncio.get_running_loop()
        working = loop.run_in_executor(self._thread, partial(work, *args, **kwargs))
        return await within(limit_s, working, f"the learner: {what}")


def _one_sample(gconfig: GenerationConfig) -> GenerationConfig:
    return gconfig.model_copy(update={"n_samples": 1})


def _batch_stats(batch: Batch, config: RolloutConfig, *, version: int) -> dict[str, float]:
    trajectories = [t for group in batch.groups for t in group]
    turns = [turn for t in trajectories for turn in t.turns.values()]
    ages = [version - t.oldest_version for t in trajectories]
    return {
        "reward/train": sum(t.reward for t in trajectories) / len(trajectories),
        "batch/num_rollouts": len(trajectories),
        "batch/num_turns": len(turns),
        "batch/num_sampled_tokens": sum(len(turn.token_ids) for turn in turns),
        "batch/num_stale_dropped": batch.num_stale,
        "batch/num_stale_reweighted": sum(age > config.max_head_offpolicyness for age in ages),
        "batch/num_groups_given_up": batch.num_given_up,
        "staleness/mean": sum(ages) / len(ages),
        "staleness/max": max(ages),
        **_by_agent(trajectories),
    }


def _by_agent(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Rollouts and mean reward of each agent, where the run has several."""
    rewards: dict[str, list[float]] = {}
    for trajectory in trajectories:
        if trajectory.open.agent:
            rewards.setdefault(trajectory.open.agent, []).append(trajectory.reward)
    stats: dict[str, float] = {}
    for name, values in sorted(rewards.items()):
        stats[f"reward/train/{name}"] = sum(values) / len(values)
        stats[f"batch/num_rollouts/{name}"] = len(values)
    return stats
