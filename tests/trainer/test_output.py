"""A view that cannot be shown is not the run's end."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import IO

import pytest

from areal_sub.trainer.output import Output
from areal_sub.trainer.progress import Progress
from areal_sub.trainer.terminal import Terminal


def reader_is_gone() -> IO[str]:
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


def disk_is_full() -> IO[str]:
    return open("/dev/full", "w")


def is_closed() -> IO[str]:
    with open(os.devnull, "w") as stream:
        return stream


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (reader_is_gone, "Broken pipe"),
        (disk_is_full, "No space left on device"),
        (is_closed, "closed file"),
    ],
)
def test_it_is_said_once_and_the_run_goes_on(
    make: Callable[[], IO[str]],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stream = make()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stream)
        terminal = Terminal()
    terminal._output.elsewhere = "metrics.jsonl"
    with terminal.live(Progress(num_steps=1)):
        terminal.say("one")
        terminal.say("two")
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("areal-sub: the terminal cannot be written to (") and reason in said
    assert said.endswith("): the run goes on; metrics are in metrics.jsonl")
    if not stream.closed:  # nobody else fails either: an agent in this process, or the interpreter
        print("three", file=stream, flush=True)
        stream.close()


def test_also_where_nobody_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with disk_is_full() as stdout, disk_is_full() as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        output = Output(stdout)
        output.write("one")
        output.flush()
        print("two", file=stderr, flush=True)


def test_where_there_is_no_stream_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    Terminal().say("one")


def test_what_its_encoding_lacks_is_replaced() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    output = Output(stream)
    output.write("é |Δ|")
    output.flush()
    assert stream.buffer.getvalue() == "é |?|".encode("latin-1")  # type: ignore[attr-defined]
