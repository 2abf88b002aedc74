"""Listeners that lie in children's own networks: their connections say which rollout is calling.

The supervisor sends each one's descriptor over a Unix socket (mode 0600, seqpacket), one message
per rollout: its id, with the listener. It is served like the proxy's own port, but every request
that arrives there carries the rollout's id in its scope, so no key, header or path can claim
another. It is closed when the rollout ends, and at once where that rollout is not open. All have
the same room for connections.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from areal_sub.proxy.connection import Connections

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 4096
BACKLOG = 128
# Agents call one after the other, or a few at once; a pool that grows is cut back without harm.
MAX_CONNECTIONS = 128
STATE_KEY = "rollout_id"
"""Under which a request's `scope["state"]` holds the rollout that its connection belongs to."""

ProtocolFactory = Callable[[dict[str, Any], Connections], asyncio.Protocol]


class Listeners:
    """Receives and serves listeners until closed."""

    def __init__(
        self,
        path: Path,
        make_protocol: ProtocolFactory,
        is_open: Callable[[str], bool],
        num_connections: int,
    ) -> None:
        """`make_protocol` makes a connection's protocol from its scope's state and those beside it.
        `num_connections`: of all listeners together."""
        self._make_protocol = make_protocol
        self._num_connections = num_connections
        self._is_open = is_open
        self._servers: dict[str, asyncio.Task[None]] = {}
        self._receiving: set[asyncio.Task[None]] = set()
        old_umask = os.umask(0o177)
        try:
            self._door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._door.bind(str(path))
        finally:
            os.umask(old_umask)
        self._door.listen(4)
        self._door.setblocking(False)
        self._accepting = asyncio.ensure_future(self._accept())

    def close_rollout(self, rollout_id: str) -> None:
        server = self._servers.pop(rollout_id, None)
        if server is not None:
            server.cancel()

    async def close(self) -> None:
        tasks = [self._accepting, *self._receiving]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._door.close()
        for rollout_id in list(self._servers):
            self.close_rollout(rollout_id)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._door)
            task = asyncio.ensure_future(self._receive(connection))
            self._receiving.add(task)
            task.add_done_callback(self._receiving.discard)

    async def _receive(self, connection: socket.socket) -> None:
        with connection:
            while True:
                await _readable(connection)
                try:
                    message, fds, _, _ = socket.recv_fds(connection, MAX_MESSAGE_BYTES, 1)
                except BlockingIOError:
                    continue
                except OSError:
                    return
                if not message:
                    return
                if fds:
                    self._serve(message.decode(), socket.socket(fileno=fds[0]))

    def _serve(self, rollout_id: str, listener: socket.socket) -> None:
        if not self._is_open(rollout_id) or rollout_id in self._servers:
            log.warning("a listener for the rollout %s, which is not open", rollout_id)
            listener.close()
            return
        try:
            listener.setblocking(False)
            listener.listen(BACKLOG)
        except OSError:
            log.exception("the listener of the rollout %s cannot be served", rollout_id)
            listener.close()
            return
        state = {STATE_KEY: rollout_id}
        among = Connections(f"rollout {rollout_id}", self._room)
        self._servers[rollout_id] = asyncio.ensure_future(
            among.accept(listener, lambda among: self._make_protocol(state, among))
        )

    def _room(self) -> int:
        return min(MAX_CONNECTIONS, self._num_connections // max(1, len(self._servers)))


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def settle() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(connection, settle)
    try:
        await ready
    finally:
        loop.remove_reader(connection)
