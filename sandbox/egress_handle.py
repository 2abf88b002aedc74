"""The caller's side of the egress proxy of one zygote, on asyncio (or uvloop).

Made by `handle` where a spec has an allowlist. Each child's listener is handed over with a leash;
`Leash.end` cuts the child's connections and tells what it was refused. Invariants: every wait has
a deadline; `on_gone` is called once, when the process has ended, however it did.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
from collections.abc import Callable

from . import plan as plans
from .errors import ZygoteFailed
from .launch import launch_egress
from .run import settle
from .wire import MAX_READY_BYTES, MAX_STATUS_BYTES, decode_refused, one_line

HAND_OVER_TIMEOUT_S = 10.0
END_TIMEOUT_S = 10.0
"""How long it may take to cut a child's connections, or to end."""


class Leash:
    """One child's hold on the proxy."""

    def __init__(self, near: socket.socket, on_disobeyed: Callable[[], None]) -> None:
        self._near = near
        self._on_disobeyed = on_disobeyed

    async def end(self) -> dict[str, int]:
        """Cut the child's connections. Returns what it was refused: "host:port" → how often."""
        refused = None
        with self._near, contextlib.suppress(OSError):
            self._near.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(END_TIMEOUT_S):
                loop = asyncio.get_running_loop()
                refused = decode_refused(await loop.sock_recv(self._near, MAX_STATUS_BYTES))
        if refused is None:
            self._on_disobeyed()
        return refused or {}

    def close(self) -> None:
        """Cut the child's connections, and do not wait for it. Idempotent."""
        self._near.close()


class EgressHandle:
    """The process, and the channel to it. Made with `EgressHandle(made, on_gone)`, in a loop."""

    def __init__(self, made: plans.Plan, on_gone: Callable[[], None]) -> None:
        """Raises `OSError` where it cannot be started."""
        settings = {"steps": plans.to_json(made)["egress"], "allow": list(made.allow)}
        self._process, self._channel = launch_egress(settings)
        self._channel.setblocking(False)
        self._on_gone = on_gone
        self._loop = asyncio.get_running_loop()
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._pidfd = os.pidfd_open(self._process.pid)
        self._loop.add_reader(self._pidfd, self._on_ended)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ready(self) -> None:
        """Returns when it is sealed. Raises `ZygoteFailed`; the caller's deadline holds."""
        raw = b""
        with contextlib.suppress(OSError):
            raw = await self._loop.sock_recv(self._channel, MAX_READY_BYTES)
        if raw != b'{"ready": true}':
            said = one_line(raw.decode(errors="replace")) or "it ended; its stderr says more"
            raise ZygoteFailed(f"the egress proxy did not start: {said}")

    async def take(self, listener: int) -> Leash:
        """Serve the connections that arrive at this descriptor. Raises `OSError`."""
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        near.setblocking(False)
        try:
            async with asyncio.timeout(HAND_OVER_TIMEOUT_S):
                while True:
                    try:
                        socket.send_fds(self._channel, [b"child"], [listener, far.fileno()])
                        return Leash(near, self.kill)
                    except BlockingIOError:
                        await self._writable()
        except BaseException:
            near.close()
            raise
        finally:
            far.close()

    def end(self) -> None:
        """Order it to end, and see that it does. Idempotent."""
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)
        self._loop.call_later(END_TIMEOUT_S, self.kill)

    def kill(self) -> None:
        if not self._gone.done():
            self._process.kill()

    async def gone(self) -> None:
        await asyncio.shield(self._gone)

    async def _writable(self) -> None:
        ready = self._loop.create_future()
        self._loop.add_writer(self._channel, settle, ready)
        try:
            await ready
        finally:
            self._loop.remove_writer(self._channel)

    def _on_ended(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=0)
        self._channel.close()
        settle(self._gone)
        self._on_gone()
