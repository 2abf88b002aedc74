"""How an engine, proxy or supervisor process begins and ends.

The trainer starts each as `python -m areal_sub.<component> SETTINGS.json` in a session of its own
(a terminal's Ctrl-C reaches the trainer only), with a pipe as stdin that the trainer never writes
to: its end-of-file means that the trainer is gone, however it went, and ends the component. As a
second factor the kernel is asked to kill the component with its parent.

A component that ends by an `INPUT_ERRORS` leaves it beside its settings, where the trainer finds it
(`refusal`): its message is what there is to say, the traceback is in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from areal_sub.errors import INPUT_ERRORS, ArealSubError

END_TIMEOUT_S = 10
"""A component that was told to end and has not by then is ended by the kernel (SIGALRM)."""
_PR_SET_PDEATHSIG = 1


def run_component(name: str, main: Callable[[dict[str, Any]], Coroutine[Any, Any, None]]) -> None:
    """Read the settings file named by argv[1] and run `main` until it ends or the trainer does."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    logging.basicConfig(
        level=os.environ.get("AREAL_SUB_LOG", "INFO"),
        format=f"%(asctime)s {name} %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    faulthandler.register(signal.SIGUSR1)  # where each thread stands, into the log
    settings_path = Path(sys.argv[1])
    settings = json.loads(settings_path.read_text())
    try:
        import uvloop

        run: Callable[..., None] = uvloop.run
    except ImportError:
        run = asyncio.run
    try:
        run(_until_orphaned(main(settings)))
    except INPUT_ERRORS as error:
        kind = next(kind for kind in INPUT_ERRORS if isinstance(error, kind))
        refusal_path(settings_path).write_text(json.dumps([kind.__name__, str(error)]))
        raise


def refusal_path(settings_path: Path) -> Path:
    """Where the component that was given `settings_path` leaves the error that it ends by."""
    return settings_path.with_suffix(".refusal.json")


def refusal(settings_path: Path) -> ArealSubError | None:
    """The user's error that the component with these settings has ended by, if that was it."""
    try:
        name, text = json.loads(refusal_path(settings_path).read_text())
    except (OSError, ValueError):  # it left none, or the disk was full
        return None
    return next(kind(text) for kind in INPUT_ERRORS if kind.__name__ == name)


async def _until_orphaned(work: Coroutine[Any, Any, None]) -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work)
    ending = False

    def end() -> None:
        """Once only: end-of-file and SIGTERM both come, and a second would cut the cleaning up."""
        nonlocal ending
        if not ending:
            ending = True
            task.cancel()
            # Whatever the ending waits for, in Python or below: it does not outlive this.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(END_TIMEOUT_S)

    def on_lifeline() -> None:
        if os.read(0, 1024) == b"":
            loop.remove_reader(0)
            end()

    loop.add_signal_handler(signal.SIGTERM, end)
    loop.add_reader(0, on_lifeline)
    with contextlib.suppress(asyncio.CancelledError):
        await task
