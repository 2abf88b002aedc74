"""Runs an agent in this process, as its child would: for `areal-sub replay --inline`.

In a thread with an event loop of its own, so that an agent that stands at a breakpoint stops
nobody else; with the rollout's environment as this process's own, so one agent at a time. No
sandbox and no deadline.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from areal_sub.errors import ConfigError
from areal_sub.records import Outcome, RunReport, RunRequest
from areal_sub.rollout.unmeasured import unmeasured_report
from areal_sub.workflow.resolve import bind_target, resolve_target


class InThisProcess:
    """An `AgentRunner`."""

    async def warm(
        self,
        target: str,
        pickled: bytes = b"",
        *,
        python: str = "",
        readable: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> list[str]:
        return []

    async def run(self, request: RunRequest) -> RunReport:
        """Raises `ConfigError` where the agent is no Python import path."""
        if not request.target:
            raise ConfigError("only an agent with an import path can be replayed with --inline")
        os.environ.update(request.env)
        return await asyncio.to_thread(_run, request)


def _run(request: RunRequest) -> RunReport:
    started_at = time.monotonic()
    outcome, result, error, trace = Outcome.COMPLETED, None, "", ""
    try:
        run = bind_target(resolve_target(request.target), request.workflow_kwargs)
        result = run(request.data)
        if inspect.isawaitable(result):
            result = asyncio.run(_awaited(result))
    except SystemExit as end:
        outcome, error = Outcome.EXITED, f"SystemExit: {end}"
    except Exception as failure:
        outcome, error = Outcome.EXCEPTION, f"{type(failure).__name__}: {failure}"
        trace = traceback.format_exc()
    return unmeasured_report(
        request.rollout_id,
        outcome,
        error=error,
        result=result,
        traceback=trace,
        started_at=started_at,
    )


async def _awaited(result: Any) -> Any:
    return await result
