"""The trainer's side of the supervisor: runs agents, each in a fresh sandboxed child.

Rollouts queue here, not in the supervisor, so that the deadline of a call is that of its child.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from areal_sub.errors import PeerGone, RpcError, TaskError, WorkflowError
from areal_sub.records import Outcome, RunReport, RunRequest
from areal_sub.rollout.environ import redirection
from areal_sub.rollout.unmeasured import unmeasured_report
from areal_sub.rpc import Client

STATS_TIMEOUT_S = 120.0  # a restart of the supervisor included
KILL_GRACE_S = 60.0
"""The supervisor kills at the rollout's own deadline, and needs this at most to see it through."""
MAX_DEPTH = 64
_NO_KEY_YET = (
    "The module is imported once, before any rollout, when there is no address of a model and no "
    "key yet: construct clients inside the agent, or set rollout.openai.sandbox.start=exec."
)


class SubprocPool:
    """Runs requests on one supervisor; any number at once. Raises `PeerGone` when it ends."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._slots: asyncio.Semaphore | None = None
        self._grader_slots: asyncio.Semaphore | None = None
        self._start_timeout_s = 0.0

    async def attach(self, *, port: int, listeners: Path, timeout_s: float) -> str:
        """Tell the supervisor which port agents call, and where the proxy takes listeners.

        Returns the sandbox's tier, its allowlist and what it does not do, as a line for the user.
        Raises `WorkflowError` where the tier is not to be had.
        """
        params = {"port": port, "listeners_path": str(listeners)}
        try:
            answer = await self._client.call("attach", params, timeout_s=timeout_s)
        except PeerGone:
            raise
        except RpcError as error:
            raise _workflow_error(self._client, error) from None
        tier = f"tier {answer['tier']}"
        if answer["allow"]:
            tier += f", which lets agents reach {', '.join(answer['allow'])}"
        return "; but ".join([tier, *answer["weaknesses"]])

    async def warm(
        self,
        target: str,
        pickled: bytes = b"",
        *,
        python: str = "",
        readable: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        grader: bool = False,
    ) -> list[str]:
        """Import the agent now, so that its import errors come before any rollout. (Without
        `target` and `pickled`: start what executes programs.)

        Returns notes for the user. Raises `WorkflowError` with the agent's traceback, `PeerGone`,
        and `DeadlineExceeded`.
        """
        await self._ready()
        params = {
            "target": target,
            "pickled": pickled,
            "python": python,
            "readable": list(readable),
            "grader": grader,
            "import_env": dict(env or {}),
        }
        limit_s = self._start_timeout_s + KILL_GRACE_S
        try:
            answer = await self._client.call("warm", params, timeout_s=limit_s, idempotent=True)
        except PeerGone:
            raise
        except RpcError as error:
            failure = _workflow_error(self._client, error)
            if not grader and any(name in str(failure) for name in redirection(port=1, key="")):
                raise WorkflowError(f"{failure}\n{_NO_KEY_YET}") from None
            raise failure from None
        notes: list[str] = answer["notes"]
        return notes

    async def run(self, request: RunRequest) -> RunReport:
        """Run the agent once. Whatever the agent does is in the report; cancelling kills it.

        Raises `PeerGone`, `DeadlineExceeded` and `RpcError` where the supervisor fails.
        """
        try:
            check_plain(request.data, "the task")
            check_plain(request.workflow_kwargs, "workflow_kwargs")
        except TaskError as error:
            return _not_started(request, str(error))
        await self._ready()
        slots = self._grader_slots if request.grader else self._slots
        assert slots is not None
        async with slots:
            limit_s = self._start_timeout_s + request.timeout_s + KILL_GRACE_S
            report = await self._client.call(
                "run", request.to_map(), timeout_s=limit_s, about=request.rollout_id
            )
        return RunReport.from_map(report)

    async def stats(self) -> dict[str, float]:
        """The supervisor's counters."""
        stats: dict[str, float] = await self._client.call(
            "stats", timeout_s=STATS_TIMEOUT_S, idempotent=True
        )
        return stats

    async def _ready(self) -> None:
        if self._slots is None:
            stats = await self.stats()
            self._start_timeout_s = stats["start_timeout_s"]
            if self._slots is None:  # another run may have come first
                self._slots = asyncio.Semaphore(int(stats["max_children"]))
                self._grader_slots = asyncio.Semaphore(int(stats["max_children"]))


def _workflow_error(client: Client, error: RpcError) -> WorkflowError:
    return WorkflowError(str(error).removeprefix(f"{client.peer}: WorkflowError: "))


def check_plain(value: Any, where: str, depth: int = 0) -> None:
    """Raises `TaskError` naming the place where `value` is not what JSON and msgpack can carry."""
    if depth > MAX_DEPTH:
        raise TaskError(f"{where} is nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, bool | float):
        return
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise TaskError(
                f"{where} is an integer of more than 64 bits ({math.log2(abs(value)):.0f})"
            )
    elif isinstance(value, str):
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            raise TaskError(f"{where} is a string with a lone surrogate, which is not text")
    elif isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise TaskError(f"{where} has the key {key!r}: keys must be strings")
            check_plain(key, f"a key of {where}", depth + 1)
            check_plain(entry, f"{where}[{key!r}]", depth + 1)
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            check_plain(entry, f"{where}[{index}]", depth + 1)
    else:
        raise TaskError(
            f"{where} is of type {type(value).__name__}: agents in children get JSON types only"
        )


def _not_started(request: RunRequest, error: str) -> RunReport:
    return unmeasured_report(request.rollout_id, Outcome.START_FAILED, error=error)
