"""The report of a rollout that had no process of its own: what only a child has is left empty.

Called by whatever runs an agent in this process, and for rollouts that never reached a child.
"""

from __future__ import annotations

import time
from typing import Any

from areal_sub.records import Outcome, RunReport


def unmeasured_report(
    rollout_id: str,
    outcome: Outcome,
    *,
    error: str = "",
    result: Any = None,
    traceback: str = "",
    started_at: float | None = None,
) -> RunReport:
    """`started_at`: on `time.monotonic`'s clock; None: it never started, so it took no time."""
    return RunReport(
        rollout_id=rollout_id,
        outcome=outcome,
        result=result,
        error=error,
        traceback=traceback,
        stdout_tail="",
        stderr_tail="",
        exit_code=None,
        signal=None,
        wall_s=0.0 if started_at is None else time.monotonic() - started_at,
        cpu_s=0.0,
        max_rss_bytes=0,
    )
