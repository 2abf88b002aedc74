"""Whole runs in which processes of ours end, or hang, in the middle of the work."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from e2e_run import Run

pytestmark = [pytest.mark.runs, pytest.mark.timeout(400)]


def test_each_process_is_started_again_and_the_run_ends_as_it_should(
    start_run: Callable[..., Run],
) -> None:
    order = ["supervisor", "engine", "proxy"]
    run = start_run("total_train_steps=5", "valid_dataset=null", "rollout.timeout_s=120")
    for number, component in enumerate(order):
        run.wait_for_steps(number + 1)
        run.note_family()
        run.process_of(component).kill()
        run.wait_until(lambda: len(run.incidents()) > number, "notice of it")  # noqa: B023
    output = run.finish()
    assert run.process.returncode == 0, output
    assert run.num_steps() == 5
    assert [each["component"] for each in run.incidents()] == order
    assert {each["what"] for each in run.incidents()} == {"ended with signal SIGKILL"}
    assert "1 engine, 1 proxy, 1 supervisor" in output and "  accounted for" in output
    assert "0 masked" in output, "what is sampled before and after is one sequence"
    assert not run.survivors()


def test_a_process_that_hangs_is_named_killed_and_replaced(start_run: Callable[..., Run]) -> None:
    run = start_run(
        "total_train_steps=3",
        "valid_dataset=null",
        "deadlines.heartbeat_s=5.0",
        "scheduler.max_restarts=100",
    )
    run.wait_for_steps(1)
    run.process_of("supervisor").send_signal(signal.SIGSTOP)
    output = run.finish()
    assert run.process.returncode == 0, output
    hung = [each["what"] for each in run.incidents() if each["component"] == "supervisor"]
    assert hung and hung[0].startswith("hangs: supervisor did not answer 'ping' within 5"), hung


def status(run: Run) -> dict[str, dict[str, Any]]:
    """What `areal-sub status --json` says, by process."""
    command = [sys.executable, "-m", "areal_sub", "status", str(run.root), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return {answer.get("name", "run"): answer for answer in answers}


def test_status_says_who_waits_for_whom_also_where_the_trainer_stands_still(
    start_run: Callable[..., Run], short_tmp: Path
) -> None:
    gate = short_tmp / "gate"
    run = start_run(
        "total_train_steps=1",
        "valid_dataset=null",
        "rollout.openai.mode=inline",
        "workflow=agents_under_test.BehindAGate",
        f"workflow_kwargs.gate={gate}",
        "rollout.timeout_s=300",
    )
    said: dict[str, dict[str, Any]] = {}

    def told() -> bool:
        said.update(status(run))
        return said["trainer"].get("status", {}).get("doing") == "waiting for rollouts"

    run.wait_until(lambda: (run.root / "sockets").exists(), "sockets")
    run.wait_until(told, "wait for rollouts")
    assert said["trainer"]["status"]["queues"]["groups running"] > 0
    assert said["engine"]["pid"] == run.process_of("engine").pid
    assert not said["proxy"]["problem"] and said["proxy"]["counts"]["num_open"] > 0

    run.process.send_signal(signal.SIGSTOP)
    said = status(run)
    assert "STOPPED" in said["trainer"]["state"] and said["trainer"]["problem"]
    assert said["trainer"]["pid"] == run.process.pid
    assert not said["engine"]["problem"] and not said["proxy"]["problem"]
    run.process.send_signal(signal.SIGCONT)
    gate.touch()
    output = run.finish()
    assert run.process.returncode == 0, output
    assert status(run) == {"run": {"going_on": False}}
