"""Whole runs with real processes: that they work, what they report, and that they end cleanly."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_run import REPO, WAIT_S, Run

from areal_sub.trajectory.accounting import account, judge_run
from areal_sub.trajectory.run_log import read_run

StartRun = Callable[..., Run]
COMPONENTS = {"areal_sub.engines.embedded", "areal_sub.proxy", "areal_sub.rollout.supervisor"}
END_WITHIN_S = 30.0


def metrics(run: Run) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run.root / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "overrides",
    [
        ["workflow=agents_under_test.plain_function"],
        ["workflow=agents_under_test:sync_function", "rollout.max_head_offpolicyness=0"],
        ["workflow=agents_under_test.Subclass", "workflow_kwargs.bonus=0.5"],
        [
            "workflow=agents_under_test.Subclass",
            "workflow_kwargs.bonus=0.5",
            "rollout.openai.mode=inline",
        ],
    ],
)
def test_every_kind_of_agent_trains(start_run: StartRun, overrides: list[str]) -> None:
    run = start_run(*overrides)
    output = run.finish()
    assert run.process.returncode == 0, output
    assert "100.00 % of" in output and "tokens sampled verbatim, 0 masked" in output
    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["learner/logprob_delta_mean"] < 1e-4
    assert rows[-1]["reward/valid"] is not None
    final = run.root / "checkpoints" / "final"
    assert (final / "model.safetensors").exists() and (final / "tokenizer.json").exists()
    assert (run.root / "config.yaml").exists()
    if "bonus" in str(overrides):
        assert rows[0]["reward/train"] == 0.5


def test_what_agents_do_wrong_has_a_name_and_the_run_goes_on(
    start_run: StartRun, short_tmp: Path
) -> None:
    """Synchronous, so that tasks are taken in their order, and every bad group is replaced by a
    later task: three steps of two usable groups reach them all."""
    mark = f"mark-{short_tmp.name}"
    ways = ["raise", "fine", "hang", "fine", "exit", "daemon"]
    ways += ["flood", "fine", "words", "fine", "nan", "fine"]
    tasks = short_tmp / "ways.jsonl"
    lines = [
        json.dumps(
            {
                "messages": [{"role": "user", "content": "What is 1 + 2?"}],
                "how": how,
                "mark": mark,
                "number": number,
            }
        )
        for number, how in enumerate(ways)
    ]
    tasks.write_text("\n".join(lines) + "\n")
    run = start_run(
        "workflow=agents_under_test.misbehave",
        f"train_dataset.path={tasks}",
        "train_dataset.shuffle=false",
        "valid_dataset=null",
        "rollout.timeout_s=3.0",
        "rollout.max_head_offpolicyness=0",
        "total_train_steps=3",
    )
    output = run.finish()
    assert run.process.returncode == 0, output
    for name in ("timeout", "exited", "output_limit", "invalid_result", "completed"):
        assert name in output, f"{name} not in:\n{output}"
    # Where the answer before had been cut off, that is what the agent's failure counts as.
    assert "length_limit" in output or "exception" in output
    assert "the agent's own mistake" in output
    alive = subprocess.run(["pgrep", "-f", mark], capture_output=True, text=True, check=False)
    assert alive.stdout == ""


def test_an_agent_that_cannot_be_imported_ends_the_run_with_its_traceback(
    start_run: StartRun,
) -> None:
    run = start_run("workflow=agents_under_test.nobody")
    output = run.finish()
    assert run.process.returncode == 2
    assert "nobody" in output and "agents_under_test" in output


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_trainer_and_a_killed_run_goes_on(
    start_run: StartRun, sign: signal.Signals
) -> None:
    again = ["total_train_steps=4", "recover.mode=auto", "recover.freq_steps=1"]
    run = start_run(*again, "workflow=agents_under_test.plain_function")
    recover = run.root / "recover"
    run.wait_until(lambda: any(recover.glob("recovery-*")), "recovery point")
    assert run.note_family() >= COMPONENTS
    started_at = time.monotonic()
    run.process.send_signal(sign)
    run.process.wait(timeout=END_WITHIN_S)
    left_s = END_WITHIN_S - (time.monotonic() - started_at)
    run.wait_until(lambda: not run.survivors(), "end of all processes", timeout_s=left_s)
    assert run.process.returncode == (-9 if sign == signal.SIGKILL else 128 + sign)

    printed = run.finish()
    assert ("  accounted for" in printed) == (sign != signal.SIGKILL), printed

    resumed = start_run(*again)
    output = resumed.finish()
    assert "  accounted for" in output
    assert resumed.process.returncode == 0, output
    assert "going on from step" in output and "changed since" not in output
    state = json.loads(next(recover.glob("recovery-*/state.json")).read_text())
    assert len(state["extra"]["tasks_digest"]) == 64
    assert "step    1/4" not in output, "that was told before"
    assert [row["step"] for row in metrics(resumed)] == [1, 2, 3, 4]
    assert len(list((resumed.root / "journal").glob("*.journal"))) == 2


def test_a_mistyped_key_is_told_before_anything_starts() -> None:
    command = [sys.executable, "-m", "areal_sub", "train", "--config"]
    command += ["examples/proxy/config.yaml", "rollout.openai.mod=subproc"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "did you mean" in done.stderr and "mode" in done.stderr


def test_the_example_script_starts_a_run(policy: Path, short_tmp: Path) -> None:
    """The example script; run from the repository, where `examples` is an import path."""
    command = [sys.executable, "examples/proxy/train.py", "--config", "examples/proxy/config.yaml"]
    command += ["scheduler.type=local", "rollout.openai.mode=subproc", f"actor.path={policy}"]
    command += [f"cluster.fileroot={short_tmp}/runs", "total_train_steps=1", "gconfig.n_samples=2"]
    command += ["train_dataset.batch_size=2", "valid_dataset=null"]
    env = {"PATH": "/usr/bin:/bin", "TMPDIR": str(short_tmp), "HOME": str(short_tmp)}
    done = subprocess.run(
        command, cwd=REPO, env=env, capture_output=True, text=True, check=False, timeout=WAIT_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 steps" in done.stdout and "validation" not in done.stdout


def test_agents_from_main_and_rows_from_code(policy: Path, short_tmp: Path) -> None:
    """A user's own script, with an agent that has no import path."""
    script = short_tmp / "script.py"
    script.write_text(
        f"""
from openai import AsyncOpenAI
from areal_sub import Trainer, load_config

class Agent:
    def __init__(self, bonus):
        self.bonus = bonus

    async def run(self, data, **extra_kwargs):
        async with AsyncOpenAI() as client:
            await client.chat.completions.create(
                model="m", messages=[{{"role": "user", "content": data["question"]}}]
            )
        return self.bonus

config = load_config(["--config", "{REPO}/tests/e2e/config.yaml", "actor.path={policy}",
    "cluster.fileroot={short_tmp}/runs", "total_train_steps=1"])
rows = [{{"question": f"What is {{i}} + 1?"}} for i in range(2)]
result = Trainer(config, train_dataset=rows, valid_dataset=rows).train(
    workflow=Agent, workflow_kwargs={{"bonus": 0.25}})
print("RESULT", result.checkpoint.exists(), result.progress.rows[-1]["reward/valid"])
"""
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=short_tmp,
        # A home beside the project's folder, not in it: agents can read the latter.
        env={"PATH": "/usr/bin:/bin", "TMPDIR": str(short_tmp), "HOME": f"{short_tmp}-home"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "RESULT True 0.25" in done.stdout, done.stdout + done.stderr


@pytest.mark.timeout(400)  # two runs
def test_what_had_ended_when_the_trainer_was_killed_is_trained_once(start_run: StartRun) -> None:
    """No recovery point but the last: all that the first attempt trained is undone."""
    again = ["total_train_steps=3", "recover.mode=auto", "recover.freq_steps=100"]
    run = start_run(*again, "workflow=agents_under_test.plain_function")
    rows = run.root / "metrics.jsonl"
    run.wait_until(
        lambda: rows.exists() and '"step": 1' in rows.read_text(), "the first step's metrics"
    )
    run.process.kill()
    run.process.wait(timeout=END_WITHIN_S)
    run.wait_until(lambda: not run.survivors(), "end of all processes")
    run.finish()

    resumed = start_run(*again, "workflow=agents_under_test.plain_function")
    output = resumed.finish()
    assert resumed.process.returncode == 0, output
    assert "of earlier attempts have ended and are yet to be trained" in output
    assert "accounted for" in output and "are not accounted for" not in output
    attempts = read_run(resumed.root / "journal")
    assert [attempt.number for attempt in attempts] == [1, 2]
    judged = judge_run(attempts)
    assert account(attempts, judged).problems == ()
    of_first = [j for j in judged if j.attempt.number == 1 and j.rollout.taken_over]
    steps = {j.decision.step for j in of_first if j.decision is not None}
    assert {1} <= steps, "the first step's rollouts are in the first step again"
    groups = {j.rollout.opened.group_id for j in of_first}
    reran = [
        j.rollout.opened.rollout_id
        for j in judged
        if j.attempt.number == 2 and j.rollout.opened.group_id in groups
    ]
    assert not {j.rollout.opened.rollout_id for j in of_first} & set(reran)
