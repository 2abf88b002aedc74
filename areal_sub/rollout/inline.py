"""Runs agents in the trainer's own event loop: no isolation, so for trusted agents only.

The same `run` and the same outcomes as `pool`. All agents share one HTTP client: a fresh one for
each rollout costs more CPU than many a rollout.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from areal_sub.errors import WorkflowError
from areal_sub.records import Outcome, RunReport, RunRequest
from areal_sub.rollout.unmeasured import unmeasured_report
from areal_sub.workflow.resolve import bind_target, resolve_target

log = logging.getLogger(__name__)

CANCEL_GRACE_S = 5.0
"""What an agent gets to clean up in when it is cancelled; one that goes on is left behind."""
MAX_TRACEBACK_CHARS = 16 * 1024


class InlineRunner:
    """Runs requests; any number at once. Close it in the event loop that it ran in."""

    def __init__(self) -> None:
        self._targets: dict[str, Any] = {}
        self._http_client: Any = None

    async def close(self) -> None:
        if self._http_client is not None:
            await self._http_client.close_shared()
            self._http_client = None

    async def warm(
        self,
        target: str,
        pickled: bytes = b"",
        *,
        python: str = "",
        readable: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> list[str]:
        """Import the agent now, in this process's own environment. Raises `WorkflowError`."""
        self._resolve(target, pickled)
        return []

    async def run(self, request: RunRequest) -> RunReport:
        """Run the agent once; a new instance where it is a class. Never raises for what it does."""
        started_at = time.monotonic()
        try:
            run = bind_target(
                self._resolve(request.target, request.pickled), request.workflow_kwargs
            )
            if not inspect.iscoroutinefunction(run):
                raise WorkflowError(
                    f"{request.target!r} is not async, so it would stop the trainer's event loop: "
                    f"make it `async def`, or use rollout.openai.mode=subproc"
                )
            kwargs = accepted(run, self._extra_kwargs(request.env))
        except Exception as failure:
            return _report(request, Outcome.START_FAILED, started_at, error=failure)
        task = asyncio.ensure_future(_guarded(run, request.data, kwargs))
        try:
            await asyncio.wait({task}, timeout=request.timeout_s)
        except asyncio.CancelledError:
            await _cancel(task, request)
            raise
        if not task.done():
            await _cancel(task, request)
            text = f"did not end within {request.timeout_s:g} s"
            return _report(request, Outcome.TIMEOUT, started_at, text=text)
        outcome, value, error = task.result()
        return _report(request, outcome, started_at, value=value, error=error)

    def _resolve(self, target: str, pickled: bytes) -> Any:
        if pickled:
            raise WorkflowError("an agent without an import path needs rollout.openai.mode=subproc")
        if target not in self._targets:
            try:
                self._targets[target] = resolve_target(target)
            except WorkflowError as error:
                if not _is_not_installed(error):
                    raise
                raise WorkflowError(
                    f"{error}. Inline agents run in the trainer's own interpreter, "
                    f"{sys.executable} (Python {sys.version_info.major}.{sys.version_info.minor}): "
                    "install what this one needs there, or use rollout.openai.mode=subproc, which "
                    "can run it in an environment of its own (rollout.openai.agent_env)"
                ) from error
        return self._targets[target]

    def _extra_kwargs(self, env: Mapping[str, str]) -> dict[str, Any]:
        if self._http_client is None:
            self._http_client = _make_http_client()
        return {
            "base_url": env["OPENAI_BASE_URL"],
            "api_key": env["OPENAI_API_KEY"],
            "http_client": self._http_client,
        }


def accepted(run: Callable[..., Any], extra_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `extra_kwargs` that `run` takes.

    Raises `WorkflowError` where it takes none: nothing else tells it where its model is.
    """
    parameters = inspect.signature(run).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(extra_kwargs)
    names = {parameter.name for parameter in parameters}
    taken = {name: value for name, value in extra_kwargs.items() if name in names}
    if "base_url" not in taken:
        raise WorkflowError(
            "in inline mode an agent gets base_url, api_key and http_client as keyword arguments, "
            "and this one takes no base_url: add **extra_kwargs, or use rollout.openai.mode=subproc"
        )
    return taken


def _is_not_installed(error: WorkflowError) -> bool:
    return isinstance(error.__cause__, ModuleNotFoundError)


async def _guarded(
    run: Callable[..., Any], data: Any, kwargs: Mapping[str, Any]
) -> tuple[Outcome, Any, BaseException | None]:
    """The agent's end as a value: what it raises must not reach the trainer's event loop."""
    try:
        return Outcome.COMPLETED, await run(data, **kwargs), None
    except SystemExit as error:  # asyncio would end the whole loop for it
        return Outcome.EXITED, None, error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        return Outcome.EXCEPTION, None, error  # its own, not ours
    except Exception as error:
        return Outcome.EXCEPTION, None, error


async def _cancel(task: asyncio.Task[Any], request: RunRequest) -> None:
    task.cancel()
    await asyncio.wait({task}, timeout=CANCEL_GRACE_S)
    if not task.done():
        log.error(
            "rollout %s: the agent %s goes on %g s after it was cancelled; it is left behind",
            request.rollout_id,
            request.target,
            CANCEL_GRACE_S,
        )


def _make_http_client() -> Any:
    import importlib

    import openai

    # The library that the installed openai is built on: httpx2 since its version 3.
    http = importlib.import_module(
        openai.DefaultAsyncHttpxClient.__mro__[1].__module__.split(".")[0]
    )

    class SharedClient(openai.DefaultAsyncHttpxClient):
        """Ignores being closed: `async with AsyncOpenAI(http_client=...)` closes its client."""

        async def aclose(self) -> None:
            pass

        async def __aexit__(self, *_: Any) -> None:
            pass

        async def close_shared(self) -> None:
            await super().aclose()

    # trust_env: a proxy for the internet is not the way to a port of this machine.
    limits = http.Limits(max_connections=None, max_keepalive_connections=None)
    return SharedClient(limits=limits, trust_env=False)


def _report(
    request: RunRequest,
    outcome: Outcome,
    started_at: float,
    *,
    value: Any = None,
    error: BaseException | None = None,
    text: str = "",
) -> RunReport:
    trace = ""
    if error is not None:
        text = (
            str(error) if isinstance(error, WorkflowError) else f"{type(error).__name__}: {error}"
        )
        trace = "".join(traceback.format_exception(error))[-MAX_TRACEBACK_CHARS:]
    return unmeasured_report(
        request.rollout_id,
        outcome,
        error=text,
        result=value,
        traceback=trace,
        started_at=started_at,
    )
