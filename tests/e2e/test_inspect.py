"""A real run in which rollouts meet every fate, and what `areal-sub inspect` says of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from e2e_run import Run

from areal_sub.records import Fate

# One group of two each, in this order. With a batch of one group and staleness up to 1, two groups
# are under way at any time; "slow" is one of them until two steps were taken beside it.
WAYS = ["slow", "vary", "equal", "half", "last", "endless", *["vary"] * 6]
FATES = {
    "slow": {"stale"},
    "vary": {"trained"},
    "equal": {"no_signal"},
    "half": {"no_baseline", "failed"},
    "last": {"trained"},
    "endless": {"unused", "failed"},
}


def inspect(*arguments: str) -> str:
    command = [sys.executable, "-m", "areal_sub", "inspect", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_fate_of_a_run_is_told_and_adds_up(
    start_run: Callable[..., Run], short_tmp: Path
) -> None:
    tasks = short_tmp / "ways.jsonl"
    messages = [{"role": "user", "content": "What is 1 + 2?"}]
    metrics = str(short_tmp / "runs" / "e2e" / "run" / "metrics.jsonl")
    rows = [{"messages": messages, "how": how, "metrics": metrics} for how in WAYS]
    tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = start_run(
        "workflow=agents_under_test.every_fate",
        "rollout.openai.mode=inline",
        f"train_dataset.path={tasks}",
        "train_dataset.shuffle=false",
        "train_dataset.batch_size=1",
        "gconfig.n_samples=2",
        "rollout.timeout_s=90",
        "total_train_steps=3",
    )
    output = run.finish()
    assert run.process.returncode == 0, output
    lines = [json.loads(line) for line in inspect(str(run.root), "--json").splitlines()]
    fates: dict[str, set[str]] = {}
    for line in lines:
        if line["split"] == "train":
            way = WAYS[int(line["group_id"][1:])]
            first = int(line["group_id"][1:]) == WAYS.index(way)
            fates.setdefault(way if first else "beyond", set()).add(line["fate"])
        else:
            assert line["fate"] == "evaluated"
    assert fates.pop("beyond", set()) <= {"unused", "failed"}
    assert fates == FATES

    (accounted,) = [line for line in output.splitlines() if "accounted for" in line]
    counts = accounted.split(maxsplit=2)[2].replace("started =", "+").split(" + ")
    started, *parts = [int(part.split()[0]) for part in counts]
    assert started == sum(parts) == len(lines)
    assert "4 trained" in accounted and "2 stale" in accounted
    # The policy knows no end of turn, so most answers are cut off before the agent raises.
    assert "1 exception" in accounted or "1 length_limit" in accounted
    assert accounted.split("accounted for")[1].strip() in inspect(str(run.root))
    steps = [json.loads(line) for line in Path(metrics).read_text().splitlines()]
    assert [row.get("fate/trained", 0) for row in steps] == [2, 0, 2]
    assert sum(row.get("fate/stale", 0) for row in steps) == 2

    trained = next(line for line in lines if line["fate"] == "trained")
    shown: dict[str, Any] = json.loads(
        inspect(str(run.root), trained["rollout_id"], "--tokens", "--json")
    )
    (sample,) = shown["samples"]
    assert sum(token["trained"] for token in sample) == trained["num_trained_tokens"] > 0
    assert {token["why"] for token in sample} == {"context", "trained"}
    assert "What is 1 + 2?" in shown["turns"][0]["context"]


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("component", "module"),
    [
        ("engine", "areal_sub.engines.embedded"),
        ("proxy", "areal_sub.proxy"),
        ("supervisor", "areal_sub.rollout.supervisor"),
    ],
)
def test_where_no_restart_is_left_the_process_is_named_and_rollouts_are_accounted_for(
    start_run: Callable[..., Run], component: str, module: str
) -> None:
    run = start_run("total_train_steps=10000", "valid_dataset=null", "scheduler.max_restarts=0")
    run.wait_for_steps(1)
    for process in psutil.Process(run.process.pid).children():
        if module in process.cmdline():
            process.kill()
    output = run.finish()
    assert run.process.returncode == 1, output
    assert f"the {component} process ended with signal SIGKILL while it was needed" in output
    assert str(Path("logs") / f"{component}.log") in output
    assert "  accounted for" in output
    fates = {json.loads(line)["fate"] for line in inspect(str(run.root), "--json").splitlines()}
    assert "trained" in fates and fates <= {*Fate} - {Fate.RUNNING, Fate.UNACCOUNTED}
