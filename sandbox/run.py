"""One child as its caller sees it: three pipes, the control connection, a timer.

Made, given its request and awaited by `handle`; a child that stands ready has no timer yet. What
the child writes is read only as far as its limits go; its end is the end of its control connection,
never that of a pipe that a stray process may hold open.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import select
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from . import outputs
from .archive import Archive
from .cgroups import Group, Usage
from .layers.polled_limits import INTERVAL_S
from .outputs import Outputs
from .report import ChildReport, Ending, conclude, exceeded
from .spec import Limits
from .wire import CHILD_READY, MAX_LISTENERS, MAX_STATUS_BYTES, Status, clean, decode_status

READ_BYTES = 64 * 1024
TAIL_BYTES = 8 * 1024
"""Kept of each of stdout and stderr."""
KILL_TIMEOUT_S = 10.0
"""How long an init may take to kill its child; then its zygote is closed."""
READY_TIMEOUT_S = 60.0
"""How long a child may take to be sealed."""
CLEANUP_TIMEOUT_S = 10.0
"""How long a run waits for the removal of its folder, once every process is gone."""


OutputSink = Callable[[int, bytes], None]


class Run:
    """One child as seen from here."""

    def __init__(
        self,
        limits: Limits,
        folder: Path,
        on_disobeyed: Callable[[], None],
        group: Group | None,
        enter: Sequence[int],
        num_listeners: int,
    ) -> None:
        self.group = group
        """Its own; `enter` leads there, and is this run's to close. None: it has none."""
        self.folder = folder
        """The child's own, in tiers where it is on disk."""
        self._loop = asyncio.get_running_loop()
        self._limits = limits
        self._limit_s = limits.wall_s
        self._on_disobeyed = on_disobeyed
        self._stopped: Ending | None = None
        self._not_shown: Exception | None = None
        """What the taker of its output raised."""
        self._status: Status | None = None
        self.is_over = False
        """The control connection has ended: so has the init."""
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self.listeners: list[int] = []
        """Descriptors of the child's listeners, as the plan orders them, where it has any."""
        self._num_listeners = num_listeners
        self._started_at = self._loop.time()
        self._wall_s = 0.0
        self._order: outputs.Order | None = None
        self._collect_here = False
        self._collected: Archive | str = "the child's end was not seen"
        """Or why there is none."""
        self._control, self.far_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        self._request, self.far_request = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        (stdout, far_stdout), (stderr, far_stderr), (result, far_result) = (
            os.pipe(),
            os.pipe(),
            os.pipe(),
        )
        self.far_fds = [far_stdout, far_stderr, far_result, *enter]
        self._stdout = Pipe(stdout, limits.output_bytes, self._on_output)
        self._stderr = Pipe(stderr, limits.output_bytes, self._on_output)
        self._result = Pipe(result, limits.result_bytes, self._on_result, keep_all=True)
        # By number: asyncio formats what is not yet registered into an error, each time.
        self._loop.add_reader(self._control.fileno(), self._on_control)
        self._timer = self._loop.call_later(READY_TIMEOUT_S, self.stop, Ending.LOST)
        self._looking: asyncio.TimerHandle | None = None

    @property
    def is_usable(self) -> bool:
        """Stands ready, or will; False for one that died while it waited."""
        return self._stopped is None and self._status is None and not self.is_over

    @property
    def can_be_asked(self) -> bool:
        """Usable, and its agent's process, sealed or to be, has not closed its end for requests:
        which shows at once, before its init or the keeper come to tell of a death."""
        poll = select.poll()
        poll.register(self._request, 0)  # a hang-up is told in any case
        return self.is_usable and not poll.poll(0)

    async def ready(self) -> None:
        """Returns once it is sealed and waits for its request, or has ended."""
        await asyncio.wait({self._ready, self._ended}, return_when=asyncio.FIRST_COMPLETED)

    def begin(
        self,
        request_fds: list[int],
        limit_s: float,
        on_output: OutputSink | None,
        order: outputs.Order | None,
        *,
        collect_here: bool,
    ) -> None:
        """Send the child its request, descriptors of files; from here on its time counts.

        `collect_here`: not its init collects its outputs, but this process, from its folder.
        """
        self._order = order
        self._collect_here = collect_here
        if on_output is not None:
            self._stdout.sink = functools.partial(self._show, on_output, 1)
            self._stderr.sink = functools.partial(self._show, on_output, 2)
        self._timer.cancel()
        self._limit_s = limit_s
        self._started_at = self._loop.time()
        if self.is_usable:
            self._timer = self._loop.call_later(limit_s, self.stop, Ending.TIMEOUT)
            if self.group is not None:
                self._looking = self._loop.call_later(INTERVAL_S, self._look)
        with contextlib.suppress(OSError):  # it is gone: the control connection says so, too
            if order is not None:  # first, so that it is there whenever the child ends
                self._control.send(order.encode())
            socket.send_fds(self._request, [b"run"], request_fds)

    def close_far_ends(self) -> None:
        self.far_control.close()
        self.far_request.close()
        for fd in self.far_fds:
            os.close(fd)
        self.far_fds = []

    async def ended(self) -> ChildReport:
        """Raises what `on_output` raised, which ends the child."""
        try:
            await asyncio.shield(self._ended)
        except asyncio.CancelledError:
            self.stop(Ending.STOPPED)
            await asyncio.shield(self._ended)  # bounded by the timers that `stop` starts
            raise
        for pipe in (self._stdout, self._stderr, self._result):
            pipe.drain()
        if self._not_shown is not None:
            raise self._not_shown
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
            wall_s=self._limit_s,
            used=(used := self._used()),
        )
        status = self._status or Status()
        collected = await self._outputs()
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
            cpu_s=used.cpu_s if used else status.cpu_s,
            max_rss_bytes=status.max_rss_bytes,
            num_killed=status.num_killed,
            peak_memory_bytes=used.peak_memory_bytes if used else 0,
            measured_by="cgroup" if used else "processes",
            written_bytes=status.written_bytes,
            outputs=collected.files,
            outputs_refused=collected.refused,
            outputs_missing=collected.missing,
        )

    async def _outputs(self) -> Outputs:
        if self._order is None:
            return Outputs()
        try:
            if self._collect_here and self._status is not None:
                where = self.folder
                self._collected = await asyncio.to_thread(
                    outputs.collect, str(where.parent), f"{where.name}/work", self._order
                )
            if isinstance(self._collected, Archive):
                return await asyncio.to_thread(outputs.read, self._collected)
            reason = self._collected
        except (OSError, ValueError) as error:
            reason = f"they cannot be collected: {clean(str(error))}"
        return Outputs(refused=tuple((path, reason) for path in self._order.paths))

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
        self._stop_looking()
        self.close_far_ends()
        self._unwatch()
        self._control.close()
        self._request.close()
        for listener in self.listeners:
            os.close(listener)
        self.listeners = []
        for pipe in (self._stdout, self._stderr, self._result):
            pipe.close()

    def _unwatch(self) -> None:
        if (number := self._control.fileno()) >= 0:
            self._loop.remove_reader(number)

    def _look(self) -> None:
        """Memory the kernel bounds, though not all of the child's processes need notice; CPU time
        it only counts."""
        used = self._used()
        if used is None:
            return
        if (over := exceeded(used, self._limits)) is not None:
            self.stop(over)
        else:
            self._looking = self._loop.call_later(INTERVAL_S, self._look)

    def _stop_looking(self) -> None:
        if self._looking is not None:
            self._looking.cancel()

    def _used(self) -> Usage | None:
        """None: it has no group, or the guardian has removed it with the zygote's."""
        with contextlib.suppress(OSError):
            return self.group.usage() if self.group is not None else None
        return None

    @property
    def _output_bytes(self) -> int:
        return self._stdout.num_bytes + self._stderr.num_bytes

    def _show(self, on_output: OutputSink, fd: int, chunk: bytes) -> None:
        if self._not_shown is None:
            try:
                on_output(fd, chunk)
            except Exception as error:
                self._not_shown = error
                self.stop(Ending.STOPPED)

    def _on_output(self) -> None:
        if self._output_bytes > self._limits.output_bytes:
            self.stop(Ending.OUTPUT_LIMIT)

    def _on_result(self) -> None:
        if self._result.num_bytes > self._limits.result_bytes:
            self.stop(Ending.RESULT_LIMIT)

    def _on_control(self) -> None:
        fds: list[int] = []
        try:
            raw, fds, _, _ = socket.recv_fds(self._control, MAX_STATUS_BYTES, MAX_LISTENERS)
        except BlockingIOError:
            return
        except OSError:
            raw = b""
        if raw == CHILD_READY and not self._ready.done():
            if len(fds) == self._num_listeners:
                self.listeners, fds = fds, []
                self._timer.cancel()
                self._ready.set_result(None)
            else:  # not by the plan, so by code of the agent's: whoever gets one would serve it
                self.stop(Ending.LOST)
        if raw.startswith(outputs.COLLECTED) and not self._collect_here:
            self._collected = outputs.collected(raw, fds)
            return
        for fd in fds:
            os.close(fd)
        if raw == CHILD_READY:
            return
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
        self._unwatch()
        self._timer.cancel()
        self._stop_looking()
        settle(self._ended)


class Pipe:
    """Reads a child's pipe as it comes: counts all bytes, keeps the last, or all up to a limit."""

    def __init__(
        self, fd: int, limit: int, on_bytes: Callable[[], None], *, keep_all: bool = False
    ) -> None:
        self.num_bytes = 0
        self.sink: Callable[[bytes], None] | None = None
        """Gets every chunk, too."""
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
        if self.sink is not None:
            self.sink(chunk)
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


def settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
