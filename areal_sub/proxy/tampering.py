"""What looks like cheating: counted per rollout and per run, with a few examples.

None of it has an effect, which is why it can be told from mistakes only by looking: an SDK that
tries a route that is not there is in here, too. Called by the agent plane for calls that it
refuses, and by the control plane for claims; the trainer reads it from `stats`.
"""

from __future__ import annotations

import re
from collections import Counter
from enum import StrEnum
from typing import Any

MAX_EXAMPLES = 5
MAX_EXAMPLE_CHARS = 160

CONTROL_CALLS = frozenset(
    {
        *("open_rollout", "stop_rollout", "end_rollout", "subscribe", "stats", "info"),
        *("update_weights", "pause", "resume", "set_reward", "reward", "start_session"),
        *("end_session", "grant_capacity", "export_trajectories", "pause_generation"),
        *("continue_generation",),
    }
)
"""What our control plane, or that of another trainer, is asked for."""

_KEY = re.compile(r"/k/[^/]*")


class Sign(StrEnum):
    """What it is counted under."""

    CLAIM_DIFFERS = "claim_differs"  # the agent returned another reward than the grader
    FOREIGN_KEY = "foreign_key"  # called with the key of another running rollout
    FINISHED_KEY = "finished_key"  # called with the key of another rollout, which had ended
    UNKNOWN_KEY = "unknown_key"  # called with a key that no rollout ever had
    CALL_AFTER_END = "call_after_end"  # called when its own rollout had ended
    CONTROL_ROUTE = "control_route"  # asked the agent plane for what only the control plane does
    UNKNOWN_ROUTE = "unknown_route"  # asked for what is not there


def sign_of_route(path: str) -> Sign:
    """Which sign a request for `path`, which no route takes, is."""
    name = path.rstrip("/").rpartition("/")[2].lower().replace("-", "_")
    return Sign.CONTROL_ROUTE if name in CONTROL_CALLS else Sign.UNKNOWN_ROUTE


class Tampering:
    """Of all rollouts since the proxy started."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()  # by `Sign`
        self.examples: dict[str, list[str]] = {}  # by `Sign`: the first few

    def add(self, sign: Sign, who: str, what: str) -> None:
        """`what` may be an agent's own words, other than its key, which is left out."""
        self.counts[sign] += 1
        examples = self.examples.setdefault(sign, [])
        if len(examples) < MAX_EXAMPLES:
            told = f"{who}: {_KEY.sub('/k/...', what)}"[:MAX_EXAMPLE_CHARS]
            examples.append("".join(char if char.isprintable() else "?" for char in told))

    def to_map(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "examples": self.examples}
