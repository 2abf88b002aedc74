"""`areal-sub chat`, as a user talks to what was trained."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_run import REPO, WAIT_S, Run

StartRun = Callable[..., Run]
pytestmark = pytest.mark.timeout(300)


def chat(lines: str, *words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "areal_sub", "chat", *words, "--max-new-tokens", "4"],
        input=lines,
        cwd=REPO / "tests/e2e",
        env={**os.environ, "TMPDIR": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )


def test_with_a_model_folder(policy: Path, short_tmp: Path) -> None:
    done = chat("hello\n\nagain\n", str(policy), folder=short_tmp)
    assert (done.returncode, done.stderr) == (0, "")
    first, *answers = done.stdout.splitlines()
    assert first == f"{policy} through the bare model; end with Ctrl-D"
    assert len(answers) >= 2, "two lines were said, the empty one is none"
    assert not list(short_tmp.glob("areal-sub-*"))


def test_with_a_run_through_its_agent(start_run: StartRun, short_tmp: Path) -> None:
    run = start_run("total_train_steps=1")
    run.finish()
    done = chat("hello\n", str(run.root), folder=short_tmp)
    assert (done.returncode, done.stderr) == (0, "")
    assert "through agents_under_test.plain_function" in done.stdout
    assert "<|im_start|>user\nhello<|im_end|>" in done.stdout, "the prompt that it was sampled for"


def test_with_what_is_no_model(short_tmp: Path) -> None:
    done = chat("", str(short_tmp), folder=short_tmp)
    assert done.returncode == 2
    assert f"{short_tmp} holds no model" in done.stderr


@pytest.mark.runs
def test_with_a_model_that_a_process_refuses(policy: Path, short_tmp: Path) -> None:
    model = short_tmp / "model"
    shutil.copytree(policy, model)
    (model / "chat_template.jinja").write_text("{% for m in messages }}")
    done = chat("", str(model), folder=short_tmp)
    assert done.returncode == 2
    where = f"the chat template {model}/chat_template.jinja, line 1"
    assert done.stderr == f"areal-sub: {where}: unexpected '}}'\n", "nothing but the sentence"
