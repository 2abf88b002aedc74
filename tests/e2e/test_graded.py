"""Whole runs in which a grader decides: liars gain nothing, and what they tried is told."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable

import pytest
from cheating import CONTROL_ROUTES
from e2e_run import REPO, Run

from areal_sub.records import EndRecord, Outcome, decode_record
from areal_sub.trajectory.journal import read_journal

pytestmark = pytest.mark.runs

StartRun = Callable[..., Run]


def ends(run: Run) -> list[EndRecord]:
    (journal,) = (run.root / "journal").glob("*.journal")
    records = [decode_record(raw) for _, raw in read_journal(journal)]
    return [record for record in records if isinstance(record, EndRecord)]


@pytest.mark.parametrize("mode", ["subproc", "inline"])
def test_a_cheating_agent_is_paid_what_the_grader_says_and_each_attempt_is_listed(
    start_run: StartRun, mode: str
) -> None:
    run = start_run(
        "workflow=cheating.cheat",
        "rollout.openai.reward=cheating:grade_length",
        f"rollout.openai.mode={mode}",
        "rollout.max_head_offpolicyness=0",
        "valid_dataset=null",
    )
    output = run.finish()
    assert run.process.returncode == 0, output
    ended = ends(run)
    ended = ended[:16]  # of the two steps; later ones were begun for a third
    tampering: Counter[str] = Counter()
    for end in ended:
        assert (end.outcome, end.claimed_reward) == (Outcome.COMPLETED, 1.0)
        assert end.reward in (0.25, 0.75)
        assert end.tampering["claim_differs"] == 1
        assert end.tampering["control_route"] == len(CONTROL_ROUTES)
        tampering.update(end.tampering)
    rows = [json.loads(line) for line in (run.root / "metrics.jsonl").read_text().splitlines()]
    per_step = [sum(end.reward or 0 for end in part) / 8 for part in (ended[:8], ended[8:])]
    assert [row["reward/train"] for row in rows] == per_step
    assert rows[0]["tampering/claim_differs"] >= 8 and rows[1]["tampering/claim_differs"] >= 16
    assert rows[-1]["grader/num_graded"] >= 16 and rows[-1]["grader/num_failed"] == 0
    if mode == "subproc":
        # The second step's rollouts find the key that one of the first step's has left.
        assert tampering["finished_key"] >= 8
        assert tampering["finished_key"] + tampering["foreign_key"] == 15
        assert "used the key of another rollout, which had ended (finished_key)" in output
    else:  # only the key says who calls
        assert "called after its end (call_after_end)" in output
    told = re.search(r"([0-9]+) x asked for what only the control plane does", output)
    assert told, output
    assert int(told[1]) >= 16 * len(CONTROL_ROUTES)  # those cancelled at the end asked for more
    assert ": claimed 1, graded 0." in output and ": POST /k/.../rl/set-reward" in output
    assert "reward     cheating:grade_length" in output
    assert "cheating:grade_length: " in output and " graded, 0 retried\n" in output


def test_a_grader_that_fails_costs_only_the_rollouts_that_it_fails_for(
    start_run: StartRun,
) -> None:
    """Four tasks, two of which cannot be graded: their groups are replaced, nobody is blamed."""
    run = start_run(
        "workflow=cheating.cheat",
        "rollout.openai.reward=cheating.fail_on_some",
        "rollout.openai.reward_kwargs={how: {'4': raise, '5': hang}}",
        "rollout.openai.reward_timeout_s=2.0",
        "gconfig.n_samples=2",
        "rollout.max_head_offpolicyness=0",
        "train_dataset.shuffle=false",
        "total_train_steps=1",
        "train_dataset.batch_size=3",
    )
    output = run.finish()
    assert run.process.returncode == 0, output
    failed = [end for end in ends(run) if end.outcome is Outcome.GRADER_FAILED]
    assert all(end.claimed_reward == 1.0 and end.reward is None for end in failed)
    start = "the grader cheating.fail_on_some failed: "
    raised = start + "exception: ValueError: the grader's own mistake"
    hung = start + "timeout: did not end within 2 s"
    assert {end.error for end in failed} == {raised, hung}
    assert {"in fail_on_some" in end.traceback for end in failed} == {True, False}
    row = json.loads((run.root / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["grader/num_retried"] >= row["grader/num_failed"] >= 6
    assert row["batch/num_groups_given_up"] >= 2
    assert row["reward/valid"] >= 0.5, "what could not be graded counts as nothing, not as 0"
    assert row["valid/num_rollouts"] == 2
    assert "FAILED and do not count" in output and (raised in output or hung in output)


def test_a_grader_that_cannot_be_imported_ends_the_run_with_its_traceback(
    start_run: StartRun,
) -> None:
    run = start_run("rollout.openai.reward=cheating:grade_lenght")
    output = run.finish()
    assert run.process.returncode == 2, output
    assert "rollout.openai.reward=cheating:grade_lenght" in output
    assert "did you mean 'grade_length'?" in output


def test_the_ready_grader_decides_over_an_agent_that_always_says_one(start_run: StartRun) -> None:
    run = start_run(
        "workflow=agents_under_test.sync_function",
        "rollout.openai.reward=areal_sub.workflow.grading:grade_final_answer",
    )
    output = run.finish()
    assert run.process.returncode == 0, output
    ended = [end for end in ends(run) if end.outcome is Outcome.COMPLETED]
    assert len(ended) >= 16 and all(end.claimed_reward == 1.0 for end in ended)
    assert {end.reward for end in ended} == {0.0}, "random weights know no answer"
    rows = [json.loads(line) for line in (run.root / "metrics.jsonl").read_text().splitlines()]
    assert [row["reward/train"] for row in rows] == [0.0, 0.0]
    assert "areal_sub.workflow.grading:grade_final_answer" in (REPO / "docs/rewards.md").read_text()
