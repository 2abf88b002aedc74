"""Graders for the tests of `areal_sub.rollout.grader`."""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import Any


def sees(task: Any, transcript: Any, outputs: Any, report: Any) -> float:
    """1 where everything that was given is here, and nothing else."""
    assert task == {"answer": "42"}
    assert [message["content"] for message in transcript] == ["6 * 7?", "42"]
    assert transcript[-1]["turn_id"] == "t2"
    assert outputs == {"out/answer": b"\x0042\xff"}
    assert [branch[-1]["turn_id"] for branch in report["branches"]] == ["t1"]
    assert (report["rollout_id"], report["num_turns"], report["stdout_tail"]) == ("r", 2, "said")
    assert report["outputs_refused"] == [["link", "it is a symbolic link"]]
    assert "claim" not in str(report)
    assert not {"OPENAI_API_KEY", "LET_THROUGH"} & os.environ.keys()
    return 1.0


async def awaits(task: Any, transcript: Any, outputs: Any, report: Any) -> dict[str, float]:
    return {"t1": 0.25, "t2": 0.5}


def scaled(task: Any, transcript: Any, outputs: Any, report: Any, *, scale: float) -> float:
    return scale


class Weighted:
    def __init__(self, *, weight: float) -> None:
        self.weight = weight

    def run(self, task: Any, transcript: Any, outputs: Any, report: Any) -> float:
        return self.weight


def connects(task: Any, transcript: Any, outputs: Any, report: Any) -> float:
    """1 where the port in the task cannot be reached."""
    try:
        socket.create_connection(("127.0.0.1", task["port"]), timeout=10).close()
    except OSError:
        return 1.0
    return 0.0


def fails(task: Any, transcript: Any, outputs: Any, report: Any) -> Any:
    how = task["how"]
    if how == "hangs":
        time.sleep(60)
    if how == "exits":
        os._exit(0)
    if how == "leaves":
        sys.exit(1)
    if how == "raises":
        raise ValueError("the grader's own")
    return {"nan": float("nan"), "words": "good", "nothing": None, "empty": {}, "turn": {"t9": 1}}[
        how
    ]
