"""The short version of `make chaos`: one of each kind of process, at moments drawn from a seed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from e2e_run import REPO


@pytest.mark.runs
@pytest.mark.timeout(900)
def test_nothing_is_lost_or_left_behind_whatever_is_killed(policy: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.chaos", "--kills", "6", "--runs", "1"]
    command += ["--hangs", "0", "--heartbeat", "60", "--policy", str(policy)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    kills = "1 child, 1 engine, 1 proxy, 1 supervisor, 1 trainer, 1 zygote"
    assert kills in done.stdout
