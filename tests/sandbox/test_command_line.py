"""`python -m sandbox run`: what is said of wrong options, and of output that nobody takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox.__main__ import NOT_READ_CODE, NOT_RUN_CODE, main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--procs 0", "--procs must be at least 1 "),
        ("--terminals -1", "--terminals must be at least 0 "),
        ("--time nan", "--time must be at least 0.001 "),
        ("--time 1e30", "and below 2**63, not 1e+30"),
        ("--mem 1M", "--mem must be at least 32M"),
        ("--mem 1.5G", "'1.5G' is not a size: write whole ones"),
        ("--ro nowhere", "--ro 'nowhere': there is no such file or folder"),
        ("--mount /x", "--mount /x: write INSIDE=OUTSIDE"),
        ("--mount /x=", "--mount /x=: write INSIDE=OUTSIDE"),
        ("--mount /x=nowhere", "--mount /x=nowhere: there is no nowhere"),
        ("--mount /x=/ --mount /x=/usr", "--mount /x=/usr: /x is given twice"),
        ("--nothing", "unrecognized arguments: --nothing"),
    ],
)
def test_a_wrong_option_is_named_and_nothing_runs(
    options: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = main(["run", *options.split(), "--", "echo", "ran"])
    except SystemExit as end:
        code = end.code
    told = capsys.readouterr()
    assert (code, told.out) == (NOT_RUN_CODE, "")
    assert complaint in told.err


def _run(command: list[str], output: int) -> tuple[int, str]:
    words = [sys.executable, "-m", "sandbox", "run", "--", *command]
    done = subprocess.run(
        words, stdout=output, stderr=subprocess.PIPE, cwd=ROOT, timeout=60, text=True, check=False
    )
    return done.returncode, done.stderr


def test_a_command_ends_when_nobody_reads_it_any_more() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert _run(["yes"], writer) == (NOT_READ_CODE, "")
    finally:
        os.close(writer)


def test_output_that_cannot_be_written_is_said() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        code, told = _run(["echo", "hello"], full)
    finally:
        os.close(full)
    assert code == NOT_RUN_CODE
    assert told == (
        "sandbox: what the command says cannot be written: [Errno 28] No space left on device\n"
    )
