"""Group scheduling with agents whose ends the test decides."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from areal_sub.errors import DeadlineExceeded, PeerGone, WorkflowError
from areal_sub.records import EndRecord, Fate, Fork, OpenRecord, Outcome, TurnRecord, float32, int32
from areal_sub.rollout.attempt import Assignment
from areal_sub.rollout.failures import FailurePolicy
from areal_sub.rollout.groups import Batch, GroupSource
from areal_sub.rollout.staleness import Admission
from areal_sub.trajectory.resume import Finished, RunPosition
from areal_sub.trajectory.tree import Trajectory

Ends = Callable[[Assignment], Outcome]


def trajectory(assignment: Assignment, outcome: Outcome, version: int) -> Trajectory:
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
        context_token_ids=int32([1]),
        token_ids=int32([2]),
        rollout_logprobs=float32([0.0]),
        versions=int32([version]),
        finish_reason="stop",
        dialect="chat",
        model="m",
        temperature=1.0,
        top_p=1.0,
        started_at=0.0,
        ended_at=0.0,
        num_prompt_tokens=1,
    )
    end = EndRecord.without_process(
        assignment.rollout_id,
        outcome,
        reward=1.0 if outcome is Outcome.COMPLETED else None,
        error="boom",
        num_turns=1,
    )
    return Trajectory.build(opened, [turn], end)


class Agents:
    """Runs assignments; those of the task `held` wait until it is released."""

    def __init__(self, ends: Ends = lambda _: Outcome.COMPLETED, held: str = "") -> None:
        self.ends = ends
        self.held = held
        self.release = asyncio.Event()
        self.started: list[Assignment] = []
        self.left_out: list[tuple[str, Fate]] = []
        self.given_up: list[str] = []

    async def run(self, assignment: Assignment) -> Trajectory:
        self.started.append(assignment)
        if assignment.task_id == self.held:
            await self.release.wait()
        return trajectory(assignment, self.ends(assignment), assignment.policy_version)


def source(
    agents: Agents,
    *,
    eta: int = 0,
    position: RunPosition | None = None,
    finished: Finished | None = None,
    num_samples: int = 3,
    keeps_stale: bool = False,
    failures: FailurePolicy | None = None,
    max_pending_bytes: int = 2**63,
) -> GroupSource:
    admission = Admission(
        batch_size=2,
        max_head_offpolicyness=eta,
        max_concurrent_rollouts=100,
        num_samples=num_samples,
        keeps_stale=keeps_stale,
    )
    return GroupSource(
        lambda number: (f"task{number}", {"i": number}),
        agents.run,
        admission,
        position=position,
        finished=finished,
        failures=failures,
        on_rollout=lambda _: None,
        on_left_out=lambda t, fate: agents.left_out.append((t.open.rollout_id, fate)),
        on_given_up=agents.given_up.append,
        max_pending_bytes=max_pending_bytes,
    )


def drive(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(10):
            await test()

    asyncio.run(main())


def test_synchronous_runs_one_batch_per_version() -> None:
    async def test() -> None:
        agents = Agents()
        groups = source(agents)
        batch = await groups.next_batch()
        assert [[t.open.task_id for t in group] for group in batch.groups] == [
            ["task0"] * 3,
            ["task1"] * 3,
        ]
        assert len(agents.started) == 6  # nothing beyond the batch before the new version
        groups.set_version(1)
        await groups.next_batch()
        assert {a.policy_version for a in agents.started[6:]} == {1}
        assert groups.num_done == 4
        await groups.close()

    drive(test)


def test_asynchronous_runs_ahead_and_a_straggler_does_not_hold_the_batch() -> None:
    async def test() -> None:
        agents = Agents(held="task0")
        groups = source(agents, eta=1)
        batch = await groups.next_batch()
        assert [group[0].open.task_id for group in batch.groups] == ["task1", "task2"]
        groups.set_version(1)
        await groups.next_batch()
        groups.set_version(2)  # the straggler is now two versions old
        agents.release.set()
        batches = [await groups.next_batch()]
        groups.set_version(3)
        batches.append(await groups.next_batch())
        trained = [group[0].open.task_id for batch in batches for group in batch.groups]
        assert "task0" not in trained
        assert sum(b.num_stale for b in batches) == 3
        assert agents.left_out == [(f"g000000-{i}", Fate.STALE) for i in range(3)]
        assert sum(b.num_given_up for b in batches) == 1
        await groups.close()

    drive(test)


def test_a_straggler_may_be_kept_and_what_is_admitted_beside_it_is_bounded() -> None:
    async def test() -> None:
        agents = Agents(held="task0")
        groups = source(agents, eta=1, keeps_stale=True)
        for version in (1, 2):
            await groups.next_batch()
            # Its group counts as started: never more than (version + eta + 1) batches of two.
            assert len({a.task_id for a in agents.started}) == (version - 1 + 2) * 2
            groups.set_version(version)
        agents.release.set()
        batches = [await groups.next_batch()]
        groups.set_version(3)
        batches.append(await groups.next_batch())
        trained = [group[0].open.task_id for batch in batches for group in batch.groups]
        assert "task0" in trained  # two versions old
        assert agents.left_out == [] and sum(b.num_stale for b in batches) == 0
        await groups.close()

    drive(test)


def test_failed_rollouts_are_left_out_and_too_small_groups_are_replaced() -> None:
    def ends(assignment: Assignment) -> Outcome:
        index = assignment.rollout_id.rsplit("-")[-1]
        if assignment.task_id == "task0":
            return Outcome.TIMEOUT if index == "0" else Outcome.COMPLETED
        if assignment.task_id == "task1":
            return Outcome.COMPLETED if index == "0" else Outcome.KILLED
        return Outcome.COMPLETED

    async def test() -> None:
        agents = Agents(ends)
        groups = source(agents)
        batch = await groups.next_batch()
        assert [(group[0].open.task_id, len(group)) for group in batch.groups] == [
            ("task0", 2),
            ("task2", 3),
        ]
        assert batch.num_given_up == 1
        # The group that is of no use is decided on first, the batch's when it is handed out.
        assert agents.left_out == [
            ("g000001-0", Fate.NO_BASELINE),
            ("g000001-1", Fate.FAILED),
            ("g000001-2", Fate.FAILED),
            ("g000000-0", Fate.FAILED),
        ]
        assert groups.held_rollouts() == []
        assert groups.num_done == 3 and groups.position == RunPosition(
            num_given_up=1, num_started=3
        )
        await groups.close()

    drive(test)


def test_a_run_in_which_everything_fails_stops_with_the_reason() -> None:
    async def test() -> None:
        agents = Agents(lambda _: Outcome.EXCEPTION)
        groups = source(agents)
        with pytest.raises(WorkflowError, match=r"6 groups in a row[^$]*exception: boom"):
            await groups.next_batch()
        await groups.close()

    drive(test)


def test_the_end_of_a_process_of_ours_ends_the_wait() -> None:
    async def test() -> None:
        async def run(assignment: Assignment) -> Trajectory:
            raise PeerGone("engine closed the connection")

        agents = Agents()
        agents.run = run  # type: ignore[method-assign]
        groups = source(agents)
        with pytest.raises(PeerGone, match="engine"):
            await groups.next_batch()
        assert groups.held_rollouts()[:2] == [("g000000-0", 0), ("g000000-1", 0)]
        assert agents.left_out == []
        await groups.close()

    drive(test)


def test_a_resumed_run_begins_with_what_it_had_not_done_with_and_takes_over_what_is_left() -> None:
    def left(rollout_id: str, task_id: str, outcome: Outcome = Outcome.COMPLETED) -> Trajectory:
        assignment = Assignment(
            rollout_id=rollout_id, group_id=rollout_id.partition("-")[0], task_id=task_id,
            split="train", data={}, policy_version=4,
        )  # fmt: skip
        ended = trajectory(assignment, outcome, 4)
        return dataclasses.replace(ended, attempt=1, went_on_from=5)

    async def test() -> None:
        agents = Agents()
        finished = {
            "g000007": [left("g000007-0", "task7"), left("g000007-2~1", "task7")],
            "g000012": [left(f"g000012-{i}", "task12") for i in range(3)],
            "g000013": [left("g000013-0", "task of another dataset"), left("g000013-9", "task13")],
        }
        position = RunPosition(version=5, num_given_up=1, num_started=12, pending=(7,))
        groups = source(agents, eta=1, position=position, finished=finished)
        assert groups.num_done == 11 and groups.position == position
        batch = await groups.next_batch()
        assert ids(batch) == [
            ["g000012-0", "g000012-1", "g000012-2"],
            ["g000007-0", "g000007-1", "g000007-2~1"],
        ]
        assert [t.attempt for group in batch.groups for t in group] == [1, 1, 1, 1, 1, 0]
        assert groups.num_taken_over == 5
        groups.set_version(6)
        await groups.next_batch()
        ran = [a.rollout_id for a in agents.started]
        assert ran[0] == "g000007-1" and not any(each.startswith("g000012") for each in ran)
        assert {"g000013-0", "g000013-1", "g000013-2"} <= set(ran)
        await groups.close()

    drive(test)


def test_what_is_held_at_the_end_is_told_with_its_attempt() -> None:
    async def test() -> None:
        agents = Agents(held="task0")
        assignment = Assignment(
            rollout_id="g000000-1", group_id="g000000", task_id="task0", split="train", data={},
            policy_version=0,
        )  # fmt: skip
        left = dataclasses.replace(trajectory(assignment, Outcome.COMPLETED, 0), attempt=3)
        groups = source(agents, finished={"g000000": [left]})
        groups.admit()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        held = [each for each in groups.held_rollouts() if each[0].startswith("g000000")]
        assert held == [("g000000-0", 0), ("g000000-1", 3), ("g000000-2", 0)]
        assert groups.position.pending == (0, 1)
        await groups.close()

    drive(test)


def ids(batch: Batch) -> list[list[str]]:
    return [sorted(t.open.rollout_id for t in group) for group in batch.groups]


def test_what_we_failed_is_run_again_within_its_budget_and_each_attempt_has_a_fate() -> None:
    def ends(assignment: Assignment) -> Outcome:
        if assignment.rollout_id in ("g000000-1", "g000000-1~1", "g000000-2"):
            return Outcome.LOST
        never = assignment.rollout_id.startswith("g000001-0")
        return Outcome.START_FAILED if never else Outcome.COMPLETED

    async def test() -> None:
        agents = Agents(ends)
        retries = {Outcome.LOST: 2, Outcome.START_FAILED: 1}
        groups = source(agents, failures=FailurePolicy(retries=retries))
        batch = await groups.next_batch()
        assert ids(batch) == [
            ["g000000-0", "g000000-1~2", "g000000-2~1"],
            ["g000001-1", "g000001-2"],
        ]
        assert sorted(agents.left_out) == [
            ("g000000-1", Fate.RETRIED),
            ("g000000-1~1", Fate.RETRIED),
            ("g000000-2", Fate.RETRIED),
            ("g000001-0", Fate.RETRIED),
            ("g000001-0~1", Fate.FAILED),
        ]
        assert groups.num_retried == 4 and groups.held_rollouts() == []
        started = [a.rollout_id for a in agents.started]
        assert len(started) == len(set(started)) == 10
        assert groups.num_running_rollouts == 0
        await groups.close()

    drive(test)


def test_one_whose_end_does_not_come_is_given_up_and_its_late_end_is_in_no_batch() -> None:
    async def test() -> None:
        agents = Agents()
        late: list[Trajectory] = []

        async def run(assignment: Assignment) -> Trajectory:
            ended = await agents.__class__.run(agents, assignment)
            if assignment.rollout_id == "g000000-0":
                late.append(ended)
                raise DeadlineExceeded("the end record of rollout g000000-0 did not arrive")
            return ended

        groups = source(agents, failures=FailurePolicy(retries={Outcome.LOST: 1}))
        groups._run = run
        batch = await groups.next_batch()
        assert ids(batch)[0] == ["g000000-0~1", "g000000-1", "g000000-2"]
        assert agents.given_up == ["g000000-0"] and len(late) == 1
        await groups.close()

        hopeless = source(agents, failures=FailurePolicy())
        hopeless._run = run
        with pytest.raises(DeadlineExceeded, match="g000000-0"):
            await hopeless.next_batch()
        await hopeless.close()

    drive(test)


def test_failures_with_a_reward_are_trained_and_ours_never() -> None:
    outcomes = [Outcome.EXCEPTION, Outcome.CONTEXT_LIMIT, Outcome.LOST]

    def ends(assignment: Assignment) -> Outcome:
        return outcomes[int(assignment.rollout_id[-1])]

    async def test() -> None:
        agents = Agents(ends)
        groups = source(agents, failures=FailurePolicy(agent_reward=-1.0, policy_reward=-0.5))
        batch = await groups.next_batch()
        for group in batch.groups:
            assert {t.end.outcome: t.reward for t in group} == {
                Outcome.EXCEPTION: -1.0,
                Outcome.CONTEXT_LIMIT: -0.5,
            }
        assert {fate for _, fate in agents.left_out} == {Fate.FAILED}
        await groups.close()

    drive(test)


@pytest.mark.parametrize(
    ("incomplete_groups", "num_started", "trained"),
    [("survivors", 6, [2, 2]), ("fill", 8, [3, 3]), ("drop", 12, [3, 3])],
)
def test_what_becomes_of_groups_that_lack_rollouts(
    incomplete_groups: Any, num_started: int, trained: list[int]
) -> None:
    def ends(assignment: Assignment) -> Outcome:
        is_bad = assignment.rollout_id in ("g000000-0", "g000001-2")
        return Outcome.EXCEPTION if is_bad else Outcome.COMPLETED

    async def test() -> None:
        agents = Agents(ends)
        groups = source(agents, failures=FailurePolicy(incomplete_groups=incomplete_groups))
        batch = await groups.next_batch()
        assert [len(group) for group in batch.groups] == trained
        if incomplete_groups == "drop":
            assert batch.num_given_up == 2
            assert ("g000000-1", Fate.NO_BASELINE) in agents.left_out
        assert len(agents.started) == num_started
        await groups.close()

    drive(test)


def test_a_group_is_filled_with_as_many_more_as_it_has_at_most() -> None:
    async def test() -> None:
        agents = Agents(lambda _: Outcome.EXCEPTION)
        groups = source(agents, failures=FailurePolicy(incomplete_groups="fill"))
        with pytest.raises(WorkflowError):
            await groups.next_batch()
        assert sum(a.group_id == "g000000" for a in agents.started) == 6
        await groups.close()

    drive(test)


def test_a_learner_that_stands_still_stops_admission_by_bytes_and_nothing_is_lost() -> None:
    """Each rollout has 16 bytes: groups of three have 48."""

    async def test() -> None:
        agents = Agents()
        groups = source(agents, eta=50, max_pending_bytes=300)
        groups.admit()
        while groups.num_running_rollouts:  # noqa: ASYNC110 (every event loop turn counts)
            await asyncio.sleep(0)
        # All that runs ends, with nobody to take it: up to 99 groups may start, by staleness.
        held = groups.num_bytes
        assert 300 <= held < 300 + 34 * 48 and held == 16 * len(agents.started)
        num_started = len(agents.started)
        groups.admit()
        assert len(agents.started) == num_started

        seen: set[str] = set()
        for version in range(1, 60):
            batch = await groups.next_batch()
            seen |= {rollout_id for group in ids(batch) for rollout_id in group}
            groups.set_version(version)
        while groups.num_running_rollouts:  # noqa: ASYNC110 (every event loop turn counts)
            await asyncio.sleep(0)
        assert len(seen) == 59 * 6 and groups.num_bytes < 300 + 34 * 48
        await groups.close()

    drive(test)


def test_one_group_larger_than_the_bound_still_makes_a_batch() -> None:
    async def test() -> None:
        groups = source(Agents(), eta=3, max_pending_bytes=1)
        for version in range(1, 4):
            assert len((await groups.next_batch()).groups) == 2
            groups.set_version(version)
        await groups.close()

    drive(test)
