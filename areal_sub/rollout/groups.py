"""Keeps groups of rollouts running ahead of the learner, within the admission rule.

    tasks ──admit──► running groups ──finished──► next_batch() ──► learner
              ▲                                        │
              └── a version went up, a group ended ◄───┘

Who waits for whom: `next_batch` waits for enough usable groups; a group waits for its slowest
rollout, each of which has its own deadline; admission waits for nobody, it is re-decided at every
event. The groups that are complete first make the batch, so a straggler holds its own group only,
which is trained later or left out as `stale` (`rollout.over_stale`); what is admitted beside it is
bounded by the admission rule, which counts it as pending.

A rollout that our own processes failed is run again within a budget; a group that lacks rollouts to
train is filled up, trained as it is or given up (`rollout/failures.py`). One with fewer than two
carries no signal (there is no baseline): it is given up and replaced by the next task. When many
groups in a row are given up, the run stops with the most frequent reason instead of spinning.

Fence: each attempt at a rollout has an id of its own (`g000007-2`, then `g000007-2~1`), so that
what comes late from one that was given up belongs to nobody, and can be in no batch.

Back-pressure: what has come and is not yet trained is bounded in groups and rollouts (`Admission`)
and in bytes (`rollout.max_pending_bytes`): a slow learner slows admission, and memory stays flat.

A group's number says its task. A run that is resumed begins with the groups that it had not done
with, takes over what is left of them, and runs only what they lack.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from areal_sub.errors import DeadlineExceeded, WorkflowError
from areal_sub.records import Fate, Outcome
from areal_sub.rollout.attempt import Assignment
from areal_sub.rollout.failures import FailurePolicy
from areal_sub.rollout.staleness import Admission, staleness
from areal_sub.trajectory.resume import Finished, RunPosition, slot_of
from areal_sub.trajectory.tree import Trajectory

# A group needs this many completed rollouts for a group-relative advantage to exist.
MIN_SURVIVORS = 2
# Batches' worth of groups given up in a row before the run stops.
MAX_GIVEN_UP_BATCHES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The finished sibling rollouts of one task."""

    group_id: str
    task_id: str
    trajectories: tuple[Trajectory, ...]  # in order of completion

    def survivors(self, version: int, admission: Admission) -> list[Trajectory]:
        """Those that can be trained, and are fresh enough for it under `version`."""
        return [
            t
            for t in self.trajectories
            if t.is_trainable and not admission.is_too_old(staleness(version, t.oldest_version))
        ]

    def left_out(
        self, version: int, admission: Admission, min_survivors: int
    ) -> list[tuple[Trajectory, Fate]]:
        """Those that are not trained under `version`, and why."""
        survivors = self.survivors(version, admission)
        ids = {t.open.rollout_id for t in survivors} if len(survivors) >= min_survivors else set()
        fresh = {t.open.rollout_id for t in survivors}
        return [
            (t, _why_left_out(t, is_fresh=t.open.rollout_id in fresh))
            for t in self.trajectories
            if t.open.rollout_id not in ids
        ]


def _why_left_out(trajectory: Trajectory, *, is_fresh: bool) -> Fate:
    if not trajectory.is_trainable:
        return Fate.FAILED
    return Fate.NO_BASELINE if is_fresh else Fate.STALE


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one training step learns from."""

    groups: tuple[tuple[Trajectory, ...], ...]  # survivors only, at least two each
    num_stale: int  # completed rollouts dropped for their age
    num_given_up: int  # groups replaced since the last batch


class GroupSource:
    """Starts groups for `tasks` and hands out batches of finished ones."""

    def __init__(
        self,
        tasks: Callable[[int], tuple[str, dict[str, Any]]],
        run: Callable[[Assignment], Awaitable[Trajectory]],
        admission: Admission,
        *,
        position: RunPosition | None = None,
        finished: Finished | None = None,
        failures: FailurePolicy | None = None,
        on_rollout: Callable[[Trajectory], None],
        on_left_out: Callable[[Trajectory, Fate], None],
        on_given_up: Callable[[str], None] = lambda rollout_id: None,
        max_pending_bytes: int = 2**63,
        running_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        """`tasks` gives (task id, task) of a group's number. Of a run that is resumed: `position`,
        and `finished`, what is left of groups that it has not done with.

        `on_left_out` gets each rollout that will not be in a batch, when that is known;
        `on_given_up` the id of one whose end did not come in time, and that is run again.
        `running_bytes`: what has come of rollouts that have not ended.
        """
        self._failures = failures or FailurePolicy()
        self._min_survivors = self._failures.min_survivors(admission.num_samples, MIN_SURVIVORS)
        self._tasks = tasks
        self._run = run
        self._admission = admission
        position = position or RunPosition()
        self._version = position.version
        # Every version was made from exactly one batch.
        self._num_consumed = position.version * admission.batch_size
        self._num_given_up = position.num_given_up
        self._num_admitted = position.num_started
        self._pending = sorted(position.pending)  # started by an earlier attempt, not by us
        self._left = dict(finished or {})
        self.num_taken_over = 0
        self._on_rollout = on_rollout
        self._on_left_out = on_left_out
        self._on_given_up = on_given_up
        # group → its rollouts that are not yet decided on, with the attempt that ran them
        self._held: dict[str, dict[str, int]] = {}
        self._max_bytes = max_pending_bytes
        self._running_bytes = running_bytes
        self.num_bytes = 0  # of ended rollouts that are not yet decided on
        self.num_retried = 0
        self._running: set[asyncio.Task[None]] = set()
        self._num_running_rollouts = 0
        self._finished: list[Group] = []
        self._event = asyncio.Event()
        self._failure: BaseException | None = None
        self._num_given_up_in_a_row = 0
        self._reasons: Counter[str] = Counter()

    @property
    def num_running_rollouts(self) -> int:
        return self._num_running_rollouts

    @property
    def num_done(self) -> int:
        """Groups that were trained or given up since the run began."""
        return self._num_consumed + self._num_given_up

    def queues(self) -> dict[str, int]:
        """What waits where; may be called from another thread."""
        return {
            "rollouts running": self._num_running_rollouts,
            "groups running": len(self._running),
            "groups finished": len(self._finished),
        }

    @property
    def position(self) -> RunPosition:
        """From which a run could be resumed with the present policy."""
        held = [int(group_id[1:]) for group_id in self._held]
        return RunPosition(
            version=self._version,
            num_given_up=self._num_given_up,
            num_started=self._num_admitted,
            pending=tuple(sorted([*held, *self._pending])),
        )

    def set_version(self, version: int) -> None:
        """The engine samples with `version` from now on."""
        self._version = version
        self.admit()

    def admit(self) -> None:
        """Start as many groups as may start now."""
        for _ in range(
            self._admission.num_startable(
                version=self._version,
                num_consumed=self._num_consumed,
                num_pending=len(self._running) + len(self._finished),
                num_running_rollouts=self._num_running_rollouts,
            )
        ):
            if self._is_full():
                return
            if self._pending:
                number = self._pending.pop(0)
            else:
                number = self._num_admitted
                self._num_admitted += 1
            task_id, data = self._tasks(number)
            group_id = f"g{number:06d}"
            left = self._take_over(group_id, task_id)
            self._held[group_id] = {t.open.rollout_id: t.attempt for t in left}
            running = asyncio.ensure_future(self._run_group(group_id, task_id, data, left))
            self._running.add(running)
            self._num_running_rollouts += self._admission.num_samples - len(left)

    def _is_full(self) -> bool:
        """Whether what runs and waits takes as much memory as it may. What a batch lacks is run
        all the same, or it would be waited for for ever."""
        if self._running or len(self._finished) >= self._admission.batch_size:
            return self.num_bytes + self._running_bytes() >= self._max_bytes
        return False

    def _take_over(self, group_id: str, task_id: str) -> list[Trajectory]:
        """What an earlier attempt left of the group; nothing, if that had another task."""
        places = {f"{group_id}-{i}" for i in range(self._admission.num_samples)}
        left = [
            self._failures.rewarded(t)
            for t in self._left.pop(group_id, [])
            if t.open.task_id == task_id and slot_of(t.open.rollout_id) in places
        ]
        self.num_taken_over += len(left)
        self.num_bytes += sum(t.num_bytes for t in left)
        return left

    async def _run_group(
        self, group_id: str, task_id: str, data: dict[str, Any], left: list[Trajectory]
    ) -> None:
        trajectories = list(left)
        num_samples = self._admission.num_samples
        there = {slot_of(t.open.rollout_id) for t in left}
        indices = [i for i in range(num_samples) if f"{group_id}-{i}" not in there]

        async def one(index: int) -> None:
            try:
                trajectory = await self._run_rollout(group_id, index, task_id, data)
            finally:
                self._num_running_rollouts -= 1
            trajectories.append(trajectory)
            self.admit()

        try:
            num = num_samples
            while True:
                async with asyncio.TaskGroup() as rollouts:
                    for index in indices:
                        rollouts.create_task(one(index))
                num_usable = sum(t.is_trainable for t in trajectories)
                missing = self._failures.num_missing(num_usable, num_samples, num - num_samples)
                if not missing:
                    break
                indices = list(range(num, num + missing))
                num += missing
                self._num_running_rollouts += missing
        except BaseExceptionGroup as group:
            self._failure = group.exceptions[0]
        else:
            self._finished.append(
                Group(group_id=group_id, task_id=task_id, trajectories=tuple(trajectories))
            )
        finally:
            current = asyncio.current_task()
            assert current is not None
            self._running.discard(current)
            self._event.set()

    async def _run_rollout(
        self, group_id: str, index: int, task_id: str, data: dict[str, Any]
    ) -> Trajectory:
        """One rollout of a group, run again as far as the configuration says."""
        retried: Counter[Outcome] = Counter()
        while True:
            suffix = f"~{retried.total()}" if retried else ""
            assignment = Assignment(
                rollout_id=f"{group_id}-{index}{suffix}",
                group_id=group_id,
                task_id=task_id,
                split="train",
                data=data,
                policy_version=self._version,
            )
            held = self._held[group_id]
            held[assignment.rollout_id] = 0
            try:
                trajectory = self._failures.rewarded(await self._run(assignment))
            except DeadlineExceeded:
                if not self._failures.tries_again(Outcome.LOST, retried):
                    raise
                retried[Outcome.LOST] += 1
                self._on_given_up(assignment.rollout_id)
            else:
                self._on_rollout(trajectory)
                outcome = trajectory.end.outcome
                if not self._failures.tries_again(outcome, retried):
                    self.num_bytes += trajectory.num_bytes
                    return trajectory
                retried[outcome] += 1
                self._on_left_out(trajectory, Fate.RETRIED)
            del held[assignment.rollout_id]
            self.num_retried += 1

    async def next_batch(self) -> Batch:
        """The next `batch_size` usable groups, oldest first.

        Raises what ended a process of ours, or `WorkflowError` where no group is usable.
        """
        usable: list[tuple[Trajectory, ...]] = []
        taken: list[Group] = []
        num_stale = num_given_up = 0
        while True:
            self.admit()
            while self._finished and len(usable) < self._admission.batch_size:
                group = self._finished.pop(0)
                survivors = group.survivors(self._version, self._admission)
                num_stale += sum(t.is_trainable for t in group.trajectories) - len(survivors)
                if len(survivors) >= self._min_survivors:
                    usable.append(tuple(survivors))
                    taken.append(group)
                    self._num_consumed += 1
                    self._num_given_up_in_a_row = 0
                    self._reasons.clear()
                else:
                    num_given_up += 1
                    self._give_up(group)
            if len(usable) == self._admission.batch_size:
                for group in taken:
                    self._decide(group)
                return Batch(groups=tuple(usable), num_stale=num_stale, num_given_up=num_given_up)
            if self._failure is not None:
                raise self._failure
            self.admit()
            self._event.clear()
            await self._event.wait()

    def held_rollouts(self) -> list[tuple[str, int]]:
        """(id, attempt of the run; 0: this one) of rollouts of groups that no batch took and that
        were not given up. Some may not have been opened yet."""
        return [each for _, held in sorted(self._held.items()) for each in sorted(held.items())]

    def _decide(self, group: Group) -> None:
        """The group leaves: in a batch that is handed out now, or as it is of no use."""
        del self._held[group.group_id]
        self.num_bytes -= sum(t.num_bytes for t in group.trajectories)
        for trajectory, fate in group.left_out(self._version, self._admission, self._min_survivors):
            self._on_left_out(trajectory, fate)

    def _give_up(self, group: Group) -> None:
        self._decide(group)
        self._num_given_up += 1
        self._num_given_up_in_a_row += 1
        self._reasons.update(_reason(t) for t in group.trajectories)
        if self._num_given_up_in_a_row >= MAX_GIVEN_UP_BATCHES * self._admission.batch_size:
            (reason, count) = self._reasons.most_common(1)[0]
            raise WorkflowError(
                f"{self._num_given_up_in_a_row} groups in a row gave nothing to train on; the most "
                f"frequent end of their rollouts ({count} of {self._reasons.total()}):\n{reason}"
            )

    async def close(self) -> None:
        """Cancel what runs; returns when every rollout has its end record or its pool is gone."""
        for task in list(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)


def _reason(trajectory: Trajectory) -> str:
    end = trajectory.end
    if trajectory.is_trainable:
        return (
            f"{end.outcome}, but too stale to train on (rollout.max_head_offpolicyness), or in a "
            "group that lacks others (rollout.failures.incomplete_groups)"
        )
    return f"{end.outcome}: {end.error}\n{end.traceback or end.stderr_tail}".rstrip()
