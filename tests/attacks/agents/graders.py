"""Graders as careless as they come, in the hands of a transcript and of output files."""

from __future__ import annotations

import pickle
import re
import time
from typing import Any


def evals(task: Any, transcript: Any, outputs: Any, report: Any) -> str:
    """Runs what the model said. (It has said: act.)"""
    return str(eval(transcript[-1]["content"]))


def unpickles(task: Any, transcript: Any, outputs: Any, report: Any) -> str:
    return str(pickle.loads(outputs["result.pkl"]))


def never_ends(task: Any, transcript: Any, outputs: Any, report: Any) -> float:
    """By a pattern that takes as long as the text lets it."""
    re.match(r"(a|a)*$", transcript[-1]["content"])
    return time.monotonic()


def measures(task: Any, transcript: Any, outputs: Any, report: Any) -> str:
    """Does nothing but look at all of it."""
    num_chars = sum(len(message["content"]) for message in transcript)
    branches = report["branches"]
    return (
        f"{num_chars} {len(branches)} {sum(map(len, branches))} {sum(map(len, outputs.values()))}"
    )
