"""What the layers of one child need beside the plan: its own folder, descriptors, variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Context:
    folder: str
    """Private to this child: holds `home`, `work` (the working directory) and `tmp`."""
    env: Mapping[str, str]
    """This run's variables; they win over the base environment."""
    stdout: int
    stderr: int
    result: int
    keep: int
    """One more descriptor that must stay open: the pipe that reports a failed step."""


RESULT_FD = 3
"""Where a child finds its result pipe once `descriptors` was applied."""
