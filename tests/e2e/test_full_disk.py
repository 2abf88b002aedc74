"""A run whose disk is full ends with the file's name, and goes on when there is room again."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from e2e_run import REPO

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
