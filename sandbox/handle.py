"""The caller's side of a zygote and its children, on asyncio (or uvloop).

`Zygote.start` returns when the agent is imported, `Zygote.run` when the child and everything that
descends from it is gone. No threads; each child costs four descriptors here while it runs.

Invariants: what a child writes is read only as far as its limits go; its end is the end of its
control connection, never that of a pipe that a stray process may hold open; every wait has a
deadline, and where a child's init does not obey in time the whole zygote is closed.
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import plan as plans
from .errors import ZygoteFailed
from .folders import remove_tree
from .launch import Launched, launch, memory_file
from .probe import Probe
from .report import ChildReport, Ending, conclude
from .spec import Limits, SandboxSpec, check_env
from .wire import MAX_STATUS_BYTES, Status, clean, decode_status, one_line, text

READ_BYTES = 64 * 1024
MAX_READY_BYTES = 2**20
TAIL_BYTES = 8 * 1024
"""Kept of each of stdout and stderr."""
KILL_TIMEOUT_S = 10.0
"""How long an init may take to kill its child; then its zygote is closed."""
CLEANUP_TIMEOUT_S = 10.0
"""How long a run waits for the removal of its folder, once every process is gone."""


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
        self._output = _Pipe(launched.output, spec.limits.output_bytes, self._on_output)
        self._sending = asyncio.Lock()
        self._runs: set[_Run] = set()
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
        run = _Run(limits, limits.wall_s if wall_s is None else wall_s, self._on_disobeyed)
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

    async def _order(self, run: _Run, request: bytes) -> None:
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
        self._loop.add_writer(self._channel, _settle, ready)
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
        removal.add_done_callback(lambda _: _settle(self._gone))


class _Run:
    """One child as seen from here: three pipes, the control connection, a timer."""

    def __init__(self, limits: Limits, wall_s: float, on_disobeyed: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._limits = limits
        self.wall_s = wall_s
        self._on_disobeyed = on_disobeyed
        self._stopped: Ending | None = None
        self._status: Status | None = None
        self.is_over = False
        """The control connection has ended: so has the init."""
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._started_at = self._loop.time()
        self._wall_s = 0.0
        self._control, self.far_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        (stdout, far_stdout), (stderr, far_stderr), (result, far_result) = (
            os.pipe(),
            os.pipe(),
            os.pipe(),
        )
        self.far_pipes = [far_stdout, far_stderr, far_result]
        self._stdout = _Pipe(stdout, limits.output_bytes, self._on_output)
        self._stderr = _Pipe(stderr, limits.output_bytes, self._on_output)
        self._result = _Pipe(result, limits.result_bytes, self._on_result, keep_all=True)
        self._loop.add_reader(self._control, self._on_control)
        self._timer = self._loop.call_later(wall_s, self.stop, Ending.TIMEOUT)

    def close_far_ends(self) -> None:
        self.far_control.close()
        for fd in self.far_pipes:
            os.close(fd)
        self.far_pipes = []

    async def ended(self) -> ChildReport:
        try:
            await asyncio.shield(self._ended)
        except asyncio.CancelledError:
            self.stop(Ending.STOPPED)
            await asyncio.shield(self._ended)  # bounded by the timers that `stop` starts
            raise
        for pipe in (self._stdout, self._stderr, self._result):
            pipe.drain()
        stopped = self._stopped
        if stopped is None:  # what came out last counts, too
            if self._output_bytes > self._limits.output_bytes:
                stopped = Ending.OUTPUT_LIMIT
            elif self._result.num_bytes > self._limits.result_bytes:
                stopped = Ending.RESULT_LIMIT
        ending, value, error, traceback = conclude(
            stopped=stopped,
            status=self._status,
            result=self._result.content(),
            limits=self._limits,
            wall_s=self.wall_s,
        )
        status = self._status or Status()
        return ChildReport(
            ending=ending,
            value=value,
            error=error,
            traceback=traceback,
            stdout_tail=self._stdout.tail(),
            stderr_tail=self._stderr.tail(),
            exit_code=status.exit_code,
            signal=status.signal,
            wall_s=self._wall_s,
            cpu_s=status.cpu_s,
            max_rss_bytes=status.max_rss_bytes,
            num_killed=status.num_killed,
        )

    def stop(self, why: Ending) -> None:
        """Order the child's init to kill it; the first reason is the one that counts."""
        if self._stopped is not None or self._status is not None or self._ended.done():
            return
        self._stopped = why
        self._timer.cancel()
        self._timer = self._loop.call_later(KILL_TIMEOUT_S, self._on_not_killed)
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)

    def release(self) -> None:
        """Close everything. The child is gone, or its zygote was given up."""
        self._timer.cancel()
        self.close_far_ends()
        self._loop.remove_reader(self._control)
        self._control.close()
        for pipe in (self._stdout, self._stderr, self._result):
            pipe.close()

    @property
    def _output_bytes(self) -> int:
        return self._stdout.num_bytes + self._stderr.num_bytes

    def _on_output(self) -> None:
        if self._output_bytes > self._limits.output_bytes:
            self.stop(Ending.OUTPUT_LIMIT)

    def _on_result(self) -> None:
        if self._result.num_bytes > self._limits.result_bytes:
            self.stop(Ending.RESULT_LIMIT)

    def _on_control(self) -> None:
        try:
            raw = self._control.recv(MAX_STATUS_BYTES)
        except BlockingIOError:
            return
        except OSError:
            raw = b""
        if not raw:
            self.is_over = True
            self._end()
        elif self._status is None:
            self._status = decode_status(raw)
            self._wall_s = self._loop.time() - self._started_at
            if self._status is not None:  # all its processes are gone; its folder is next
                self._timer.cancel()
                self._timer = self._loop.call_later(CLEANUP_TIMEOUT_S, self._end)

    def _on_not_killed(self) -> None:
        self._on_disobeyed()
        self._timer = self._loop.call_later(2 * KILL_TIMEOUT_S, self._end)

    def _end(self) -> None:
        self._loop.remove_reader(self._control)
        self._timer.cancel()
        _settle(self._ended)


class _Pipe:
    """Reads a child's pipe as it comes: counts all bytes, keeps the last, or all up to a limit."""

    def __init__(
        self, fd: int, limit: int, on_bytes: Callable[[], None], *, keep_all: bool = False
    ) -> None:
        self.num_bytes = 0
        self._limit = limit
        self._on_bytes = on_bytes
        self._keep = limit if keep_all else TAIL_BYTES
        self._kept = bytearray()
        self._fd = fd
        os.set_blocking(fd, False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(fd, self._read)

    def _read(self) -> bool:
        """One read; False where there is nothing more for now, or will ever be."""
        try:
            chunk = os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return False
        if not chunk:
            self._loop.remove_reader(self._fd)
            return False
        self.num_bytes += len(chunk)
        self._kept += chunk
        if len(self._kept) > self._keep:
            del self._kept[: -self._keep]
        if self.num_bytes > self._limit:
            self._loop.remove_reader(self._fd)  # it is over: leave the rest unread
        self._on_bytes()
        return self.num_bytes <= self._limit

    def drain(self) -> None:
        """Read what is left, without waiting for writers that may still hold the pipe."""
        while self._fd >= 0 and self.num_bytes <= self._limit and self._read():
            pass

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def content(self) -> bytes:
        return bytes(self._kept)

    def tail(self) -> str:
        return clean(self._kept.decode("utf-8", "replace"))


def _make_folders(*folders: Path) -> None:
    for folder in folders:
        folder.mkdir(mode=0o700, parents=True)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):  # what cannot be removed stays below the caller's folder
        remove_tree(str(folder))


def _object(raw: bytes) -> dict[str, Any]:
    try:
        message = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}
