"""Whole runs in which processes of ours end, or hang, in the middle of the work."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from e2e_run import Run

pytestmark = pytest.mark.timeout(400)

MODULES = {
    "engine": "areal_sub.engines.embedded",
    "proxy": "areal_sub.proxy",
    "supervisor": "areal_sub.rollout.supervisor",
}


def process_of(run: Run, component: str) -> psutil.Process:
    """The one that runs now. It is started again while the test looks for it, maybe."""
    found: list[psutil.Process] = []

    def look() -> bool:
        for process in psutil.Process(run.process.pid).children():
            try:
                if MODULES[component] in process.cmdline():
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return bool(found)

    run.wait_until(look, f"process of the {component}")
    return found[-1]


def incidents(run: Run) -> list[dict[str, Any]]:
    path = run.root / "incidents.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def num_steps(run: Run) -> int:
    path = run.root / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_each_process_is_started_again_and_the_run_ends_as_it_should(
    start_run: Callable[..., Run],
) -> None:
    order = ["supervisor", "engine", "proxy"]
    run = start_run("total_train_steps=5", "valid_dataset=null", "rollout.timeout_s=120")
    for number, component in enumerate(order):
        run.wait_for_steps(number + 1)
        run.note_family()
        process_of(run, component).kill()
        run.wait_until(lambda: len(incidents(run)) > number, "notice of it")  # noqa: B023
    output = run.finish()
    assert run.process.returncode == 0, output
    assert num_steps(run) == 5
    assert [each["component"] for each in incidents(run)] == order
    assert {each["what"] for each in incidents(run)} == {"ended with signal SIGKILL"}
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
    process_of(run, "supervisor").send_signal(signal.SIGSTOP)
    output = run.finish()
    assert run.process.returncode == 0, output
    hung = [each["what"] for each in incidents(run) if each["component"] == "supervisor"]
    assert hung and hung[0].startswith("hangs: supervisor did not answer 'ping' within 5"), hung
