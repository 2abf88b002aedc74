"""A whole run whose learner is two processes, one of which dies; one process goes on from there."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable

import psutil
import pytest
from e2e_run import Run

pytestmark = pytest.mark.runs


# Seven processes of ours import torch in it: on a busy machine that alone takes minutes.
@pytest.mark.timeout(600)
def test_a_run_with_two_learner_processes_names_the_one_that_dies_and_goes_on_with_one(
    start_run: Callable[..., Run],
) -> None:
    settings = ["workflow=agents_under_test.plain_function", "recover.mode=auto"]
    settings += ["recover.freq_steps=1", "valid_dataset=null"]
    run = start_run(*settings, "actor.num_processes=2", "total_train_steps=1000")
    metrics = run.root / "metrics.jsonl"
    run.wait_until(
        lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, "2 steps", 300.0
    )
    family = psutil.Process(run.process.pid).children(recursive=True)
    (follower,) = [p for p in family if "areal_sub.learner" in p.cmdline()]
    os.kill(follower.pid, signal.SIGKILL)
    output = run.finish(200.0)
    assert run.process.returncode not in (0, -signal.SIGKILL)
    assert "learner-1 process ended" in output or "rank 1 did not get past" in output, output

    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    num_steps = rows[-1]["step"] + 1
    assert rows[0]["learner/logprob_delta_mean"] < 1e-4
    again = start_run(*settings, "actor.num_processes=1", f"total_train_steps={num_steps}")
    output = again.finish(300.0)
    assert again.process.returncode == 0, output
    assert "going on from step" in output
    assert (run.root / "checkpoints" / "final" / "model.safetensors").exists()
