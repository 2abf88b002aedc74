"""What the machine does to a run: a full disk, files that cannot be written, no memory for the
engine, a clock that jumps. Each has a clear end, damages nothing, and the run goes on after it."""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_run import REPO, Run

from areal_sub.trajectory.run_log import read_run

pytestmark = pytest.mark.runs

StartRun = Callable[..., Run]
GOES_ON = ("valid_dataset=null", "recover.mode=auto", "recover.freq_steps=1")


# A policy of 1.6 MB: a recovery point takes 5 MB, and two are there for a moment.
SCRIPT = """
mount -t tmpfs -o size=8m tmpfs {runs}
{train} ; echo first $?
mount -o remount,size=64m {runs}
{train} ; echo second $?
"""


@pytest.mark.timeout(600)
def test_a_full_disk_is_an_error_with_a_name_and_nothing_is_damaged(
    policy: Path, short_tmp: Path
) -> None:
    runs = short_tmp / "runs"
    runs.mkdir()
    train = [
        *(sys.executable, "-m", "areal_sub", "train"),
        *("--config", str(REPO / "tests/e2e/config.yaml"), f"actor.path={policy}"),
        *(f"cluster.fileroot={runs}", "total_train_steps=3", "valid_dataset=null"),
        *("recover.mode=auto", "recover.freq_steps=1"),
    ]
    script = SCRIPT.format(runs=runs, train=shlex.join(train))
    unshare = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    allowed = subprocess.run([*unshare, "mount", "-t", "tmpfs", "tmpfs", runs], check=False)
    if allowed.returncode:
        pytest.skip("this machine lets us mount nothing")
    done = subprocess.run(
        [*unshare, "sh", "-c", script],
        cwd=REPO / "tests/e2e",
        env={**os.environ, "TMPDIR": str(short_tmp)},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert "first 1" in done.stdout and "second 0" in done.stdout, said
    assert "cannot write" in said and "MiB are free there" in said, said
    assert "going on from step 1" in done.stdout, said
    assert "not accounted for" not in said, said


@pytest.mark.timeout(400)  # two runs
def test_a_recovery_point_that_cannot_be_written_ends_the_run_which_goes_on_later(
    start_run: StartRun,
) -> None:
    run = start_run(*GOES_ON, "total_train_steps=100000")
    run.wait_for_steps(2)
    recover = run.root / "recover"
    recover.rename(run.root / "aside")
    recover.touch()  # not even root writes into that
    output = run.finish()
    assert run.process.returncode == 1 and f"cannot write {recover}" in output, output
    assert "Traceback" not in output

    recover.unlink()
    (run.root / "aside").rename(recover)
    again = start_run(*GOES_ON, f"total_train_steps={run.num_steps() + 1}")
    output = again.finish()
    assert again.process.returncode == 0 and "going on from step" in output, output


@pytest.mark.timeout(400)  # two runs
def test_an_engine_without_memory_is_an_error_that_says_so_or_is_replaced(
    start_run: StartRun,
) -> None:
    """Where it fails first, in a step or in loading weights, is not for the test to say."""
    run = start_run(*GOES_ON, "total_train_steps=30")
    run.wait_for_steps(2)
    engine = run.process_of("engine")
    most = engine.memory_info().vms + 2**20
    resource.prlimit(engine.pid, resource.RLIMIT_AS, (most, most))
    output = run.finish()
    if run.process.returncode == 0:  # replaced: why it ended, it may have had no memory to say
        assert run.incidents()[0]["component"] == "engine"
    else:
        assert "memory" in output.lower(), output
    again = start_run(*GOES_ON, f"total_train_steps={run.num_steps() + 1}")
    output = again.finish()
    assert again.process.returncode == 0 and "going on from step" in output, output


JUMPING_CLOCK = """
import itertools, time
real, calls = time.time, itertools.count()
time.time = lambda: real() + (0, 90_000, -90_000)[next(calls) // 10 % 3]
"""


def test_a_clock_that_jumps_by_a_day_changes_nothing(start_run: StartRun, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(JUMPING_CLOCK)
    run = start_run(
        "total_train_steps=6",
        *("journal.segment_bytes=20000", "journal.retain_age_s=3600"),
        variables={"PYTHONPATH": str(tmp_path)},
    )
    output = run.finish()
    assert run.process.returncode == 0 and "  accounted for" in output, output
    assert run.incidents() == []
    (attempt,) = read_run(run.root / "journal")
    decided = [d.decided_at for log in attempt.rollouts.values() for d in log.decisions]
    assert max(decided) - min(decided) > 80_000, "the clock did not jump"
