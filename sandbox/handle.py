"""The caller's side of a zygote and its children, on asyncio (or uvloop).

`Zygote.start` returns when the agent is imported, `Zygote.run` when the child and everything that
descends from it is gone. No threads; each child costs four descriptors here while it runs.

Invariants: every wait has a deadline; where a child's init does not obey in time the whole zygote
is closed; closing or losing a zygote ends every child of it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import plan as plans
from .errors import ZygoteFailed
from .folders import remove_tree
from .launch import Launched, launch, memory_file
from .probe import Probe
from .report import ChildReport, Ending
from .run import KILL_TIMEOUT_S, Pipe, Run, settle
from .spec import SandboxSpec, check_env
from .wire import one_line, text

MAX_READY_BYTES = 2**20


class Zygote:
    """One agent, imported and warm. Make it with `await Zygote.start(...)`."""

    def __init__(self, launched: Launched, spec: SandboxSpec, folder: Path) -> None:
        self.spec = spec
        self.notes: list[str] = []
        """What the warm-up could not do, and whether the agent's import started threads."""
        self._folder = folder
        self._guardian = launched.guardian
        self._channel = launched.channel
        self._lifeline = launched.lifeline
        self._loop = asyncio.get_running_loop()
        self._output = Pipe(launched.output, spec.limits.output_bytes, self._on_output)
        self._sending = asyncio.Lock()
        self._runs: set[Run] = set()
        self._num_runs = 0
        self._closed = False
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._pidfd = os.pidfd_open(self._guardian.pid)
        self._loop.add_reader(self._pidfd, self._on_gone)
        self._channel.setblocking(False)

    @classmethod
    async def start(
        cls,
        spec: SandboxSpec,
        probe: Probe,
        *,
        folder: Path,
        target: str = "",
        pickled: bytes = b"",
        python: str = sys.executable,
        python_path: Sequence[str] = (),
        timeout_s: float,
    ) -> Zygote:
        """Start `python` in `folder` (made here, removed at the end) and have it import the agent.

        The agent is `target`, an import path, or `pickled`, its dill. Raises `PlanError`, and
        `ZygoteFailed` with the agent's traceback.
        """
        settings = {
            "target": target,
            "pickled": base64.b64encode(pickled).decode(),
            "python_path": list(python_path),
            "steps": plans.to_json(plans.plan(spec, probe)),
        }
        home = folder / "zygote"
        _make_folders(folder, home)
        label = target or "pickled"
        try:
            launched = launch(spec, settings, python=python, folder=str(home), label=label)
        except OSError as error:
            _remove(folder)
            raise ZygoteFailed(f"cannot start {python!r}: {error}") from None
        zygote = cls(launched, spec, folder)
        try:
            async with asyncio.timeout(timeout_s):
                await zygote._until_ready(label)
        except TimeoutError:
            await zygote.close()
            tail = zygote._output.tail()
            raise ZygoteFailed(f"{label!r} was not imported within {timeout_s:g} s", tail) from None
        except BaseException:
            await zygote.close()
            raise
        return zygote

    @property
    def is_alive(self) -> bool:
        return not self._closed and not self._gone.done()

    @property
    def guardian_pid(self) -> int:
        return self._guardian.pid

    async def run(
        self,
        data: Any,
        *,
        kwargs: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        wall_s: float | None = None,
    ) -> ChildReport:
        """Run the agent once, in a fresh child, with `data` (JSON types).

        Returns when all its processes are gone. Cancelling kills the child first. Raises
        `SpecError` for an invalid `env`, `TypeError` or `ValueError` for data that is not JSON.
        """
        check_env(env or {})
        self._num_runs += 1
        folder = self._folder / str(self._num_runs)
        request = {
            "data": data,
            "kwargs": dict(kwargs or {}),
            "env": dict(env or {}),
            "folder": str(folder),
        }
        limits = self.spec.limits
        run = Run(limits, limits.wall_s if wall_s is None else wall_s, self._on_disobeyed)
        self._runs.add(run)
        try:
            await self._order(run, json.dumps(request).encode())
            report = await run.ended()
            if run.is_over and folder.exists():  # its init was killed before it came to that
                await asyncio.to_thread(_remove, folder)
            return report
        finally:
            self._runs.discard(run)
            run.release()

    async def close(self, timeout_s: float = 10.0) -> None:
        """End everything: children, zygote, guardian. Never raises; idempotent."""
        for run in self._runs:
            run.stop(Ending.LOST)
        self._cut_lifeline()
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(self._gone)
        except TimeoutError:
            self._guardian.kill()  # stopped by the agent, say; the zygote dies with it
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await asyncio.shield(self._gone)

    async def gone(self) -> None:
        """Returns once the guardian, so everything below it, has ended."""
        await asyncio.shield(self._gone)

    async def _until_ready(self, label: str) -> None:
        try:
            raw = await self._loop.sock_recv(self._channel, MAX_READY_BYTES)
        except OSError:
            raw = b""
        message = _object(raw)
        if message.get("ready") is True:
            self.notes = [one_line(note) for note in message.get("notes", [])]
            if message.get("num_threads", 1) != 1:
                self.notes.append(
                    f"importing {label!r} started threads: forking with threads can deadlock"
                )
            return
        if "error" in message:
            raise ZygoteFailed(
                f"cannot import the agent {label!r}: {one_line(message['error'])}",
                text(message.get("traceback")),
            )
        await self.close()
        raise ZygoteFailed(
            f"the process that imported {label!r} ended with code {self._guardian.returncode}",
            self._output.tail(),
        )

    async def _order(self, run: Run, request: bytes) -> None:
        """Send the order for a child. A zygote that is gone ends the run as LOST."""
        request_fd = memory_file("request", request)
        try:
            fds = [run.far_control.fileno(), request_fd, *run.far_pipes]
            async with self._sending:
                while self.is_alive:
                    try:
                        socket.send_fds(self._channel, [b"run"], fds)
                        return
                    except BlockingIOError:
                        async with asyncio.timeout(run.wall_s):
                            await self._writable()
        except (OSError, TimeoutError):
            pass
        finally:
            os.close(request_fd)
            run.close_far_ends()
        run.stop(Ending.LOST)

    async def _writable(self) -> None:
        ready = self._loop.create_future()
        self._loop.add_writer(self._channel, settle, ready)
        try:
            await asyncio.wait({ready, self._gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._loop.remove_writer(self._channel)

    def _on_output(self) -> None:
        if self._output.num_bytes > self.spec.limits.output_bytes:
            self._cut_lifeline()

    def _cut_lifeline(self) -> None:
        """The guardian then kills everything below it, and ends."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._lifeline.shutdown(socket.SHUT_RDWR)

    def _on_disobeyed(self) -> None:
        """An init does not answer: its guardian is what is left to end it."""
        self._cut_lifeline()
        self._loop.call_later(KILL_TIMEOUT_S, self._guardian.kill)

    def _on_gone(self) -> None:
        self._closed = True
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._guardian.wait(timeout=0)
        self._output.drain()
        self._output.close()
        self._channel.close()
        self._lifeline.close()
        for run in self._runs:  # an init that outlived its guardian still obeys this
            run.stop(Ending.LOST)
        # In a thread: what children left may be large, and the other zygotes go on.
        removal = self._loop.run_in_executor(None, _remove, self._folder)
        removal.add_done_callback(lambda _: settle(self._gone))


def _make_folders(*folders: Path) -> None:
    for folder in folders:
        folder.mkdir(mode=0o700, parents=True)


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):  # what cannot be removed stays below the caller's folder
        remove_tree(str(folder))


def _object(raw: bytes) -> dict[str, Any]:
    try:
        message = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}
