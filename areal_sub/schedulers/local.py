"""Starts engine, proxy and supervisor on this machine, watches them, and ends them.

Invariants: a component's stdin is a pipe that only this process holds, so it ends when we do,
however we go (see `areal_sub.component`); its output goes to a log file; it runs in a session of
its own, so a terminal's Ctrl-C reaches the trainer only, which then ends the components in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from areal_sub.component import refusal, refusal_path
from areal_sub.errors import ComponentDied

STOP_TIMEOUT_S = 3.0
_LOG_TAIL_LINES = 15
_LOG_TAIL_BYTES = 16 * 1024


class Component:
    """One running process of ours. Start it with `Component.start`."""

    def __init__(
        self,
        name: str,
        process: asyncio.subprocess.Process,
        *,
        settings_path: Path,
        log_path: Path,
        log_stays: bool,
    ) -> None:
        self.name = name
        self._settings_path = settings_path
        self._log_path = log_path
        self._log_stays = log_stays
        self._process = process
        self._stopping = False
        self.died: asyncio.Task[None] = asyncio.ensure_future(self._watch())

    @classmethod
    async def start(
        cls,
        name: str,
        module: str,
        settings: Mapping[str, Any],
        *,
        folder: Path,
        log_path: Path,
        log_stays: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> Component:
        """Run `python -m module SETTINGS.json`; `env` replaces the inherited environment.

        `log_stays`: whether a user who is told of `log_path` can still look there.
        """
        settings_path = folder / f"{name}.json"
        settings_path.write_text(json.dumps(settings))
        refusal_path(settings_path).unlink(missing_ok=True)  # an earlier process's
        with log_path.open("ab") as log_file:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                module,
                str(settings_path),
                stdin=asyncio.subprocess.PIPE,
                stdout=log_file,
                stderr=log_file,
                env=None if env is None else dict(env),
                start_new_session=True,
            )
        return cls(
            name,
            process,
            settings_path=settings_path,
            log_path=log_path,
            log_stays=log_stays,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def how_ended(self) -> str:
        """Of an ended process, what goes on from its name."""
        code = self._process.returncode
        assert code is not None
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"ended with {how}"

    async def _watch(self) -> None:
        """Raises one of `INPUT_ERRORS` where it ended by that, else `ComponentDied`."""
        await self._process.wait()
        if not self._stopping:
            raise refusal(self._settings_path) or ComponentDied(
                f"the {self.name} process {self.how_ended} while it was needed; {self.log_end()}"
            )

    def log_end(self) -> str:
        """The last lines of its log, with where it is, for the end of an error's message."""
        where = f" ({self._log_path})" if self._log_stays else ""
        return f"the end of its log{where}:\n{self.log_tail()}"

    def log_tail(self) -> str:
        """The last lines of its log, as a quotation."""
        with self._log_path.open("rb") as log_file:
            log_file.seek(max(0, log_file.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
            lines = log_file.read().decode(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
        return "\n".join(f"  | {line}" for line in lines) or "  | (empty)"

    async def kill(self) -> None:
        """End it by SIGKILL, if it has not ended; returns when it is gone. What is below it ends
        by itself, as with any end of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await asyncio.gather(self.died, return_exceptions=True)

    async def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """End it: by end-of-file, then SIGTERM, then SIGKILL; returns when it is gone.

        It has half of `timeout_s` to end by itself, and half to end by SIGTERM.
        """
        self._stopping = True
        assert self._process.stdin is not None
        self._process.stdin.close()
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                async with asyncio.timeout(timeout_s / 2):
                    await asyncio.shield(asyncio.gather(self.died, return_exceptions=True))
                return
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, sign)
        await asyncio.gather(self.died, return_exceptions=True)
