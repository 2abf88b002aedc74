"""A recorded run, replayed: the agent goes the same way; a changed one is told where it left."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_run import REPO, Run

from areal_sub.trajectory.run_log import read_rollout, read_run

pytestmark = pytest.mark.runs

StartRun = Callable[..., Run]


def replay(run: Run, *words: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "areal_sub", "replay", str(run.root), *words]
    folder = run.root.parents[2]
    done = subprocess.run(
        command,
        cwd=REPO / "tests/e2e",
        env={**os.environ, "TMPDIR": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.timeout(400)
def test_a_run_is_replayed_and_a_changed_agent_is_told_where_it_goes_another_way(
    start_run: StartRun,
) -> None:
    run = start_run(
        "workflow=agents_under_test.plain_function", "total_train_steps=1", "valid_dataset=null"
    )
    output = run.finish()
    assert run.process.returncode == 0, output

    code, shown = replay(run, "--limit", "3")
    assert code == 0, shown
    assert shown.count("as recorded: 1 of 1 recorded answers given") == 3

    code, shown = replay(run, "g000000-0", "--inline")
    assert code == 0 and "g000000-0  as recorded" in shown, shown

    code, shown = replay(run, "g000000-0", "workflow=agents_under_test.another_prompt")
    assert code == 1, shown
    assert "0 of 1 recorded answers given" in shown
    assert "call 1: at token " in shown and "asked is 'And" in shown

    code, shown = replay(run, "nobody")
    assert code == 2 and "no rollout 'nobody'" in shown
    assert not list(Path(run.root.parents[2]).glob("areal-sub-*"))

    offline = start_run(
        "workflow=agents_under_test.plain_function",
        "valid_dataset=null",
        "trial_name=offline",
        f"rollout.replay_from={run.root}",
    )
    output = offline.finish()
    assert offline.process.returncode == 0, output
    assert "training from the" in output and "2 of 2 steps" in output
    attempts = read_run(run.root.with_name("offline") / "journal")
    (attempt,) = attempts
    assert len(attempt.rollouts) >= 16  # two steps of two groups of four
    (recorded,) = read_run(run.root / "journal")
    was = {
        turn.turn_id
        for rollout_id in recorded.rollouts
        for turn in read_rollout(recorded.journal, rollout_id)[1]
    }
    again = read_rollout(attempt.journal, "g000000-0")[1]
    assert again and {turn.turn_id for turn in again} <= was
