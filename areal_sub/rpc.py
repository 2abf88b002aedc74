"""Calls between our own processes: msgpack messages over a Unix socket.

Who uses it: the trainer calls proxy (control plane), supervisor and engine; the proxy calls the
engine. Agents never can: the sockets lie in a 0700 directory that no child is told of.

One connection multiplexes any number of calls. Messages are msgpack arrays, back to back:

    caller  → callee   [CALL, id, method, params]      [CANCEL, id]
    callee  → caller   [ITEM, id, payload]*  then  [DONE, id, payload] | [ERROR, id, [kind, text]]

A handler is `async def h(params) -> payload`, or an async generator whose items stream to the
caller; an item that it yields as `Last(item)` goes with the end, in one message. Invariants: a call
ends with exactly one DONE or ERROR; when either side goes away, all of its calls end (the callee's
handlers are cancelled, the caller's waits raise `PeerGone`); a message larger than
`MAX_MESSAGE_BYTES` ends the connection; writers wait for the socket to drain, so a slow reader
slows its writer instead of growing its memory. Every server answers `ping`, and `status` with what
its process waits for.

A client that `redials` outlives its peer: calls that were under way raise `PeerGone`, later ones
wait, within their deadlines, for the next process that listens at the path. A new process takes the
path over by `os.rename` of its own socket, when it is ready to be called.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import logging
import os
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgpack

from areal_sub.errors import ArealSubError, DeadlineExceeded, PeerGone, RpcError
from areal_sub.waits import waiting, waits

log = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 256 * 2**20
READ_BYTES = 256 * 2**10
# A stream whose reader lags this many items behind stops reading its socket.
MAX_QUEUED_ITEMS = 1024

CALL, CANCEL, ITEM, DONE, ERROR = range(5)
_GONE = -1  # on no wire: what a call finds in its queue when the connection ended

Params = dict[str, Any]
Handler = Callable[[Params], Awaitable[Any] | AsyncIterator[Any]]


@dataclass(frozen=True, slots=True)
class Last:
    """A handler's last item: with it the call is done, whatever the handler still does."""

    item: Any


def _pack(message: list[Any]) -> bytes:
    # By default it takes 256 KB first, which is as much work as all the rest.
    packed: bytes = msgpack.packb(message, use_bin_type=True, buf_size=1024)
    return packed


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[list[Any]]:
    unpacker = msgpack.Unpacker(raw=False, strict_map_key=False, max_buffer_size=MAX_MESSAGE_BYTES)
    while chunk := await reader.read(READ_BYTES):
        unpacker.feed(chunk)
        for message in unpacker:
            yield message


def _forget(calls: dict[int, asyncio.Task[None]], call_id: int, _: asyncio.Task[None]) -> None:
    calls.pop(call_id, None)


async def _ping(params: Params) -> None:
    """That the process's event loop goes round."""


class Server:
    """Serves `handlers` on a Unix socket (mode 0600) until closed."""

    def __init__(
        self,
        path: Path,
        handlers: Mapping[str, Handler],
        *,
        describe: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        """`describe`: what its process says of itself beside that, to `areal-sub status`."""
        self._describe = describe
        self.path = path
        self._handlers = {"ping": _ping, "status": self._status, **handlers}
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def _status(self, params: Params) -> dict[str, Any]:
        return {**self._describe(), "waits": [wait.to_map() for wait in waits()]}

    async def start(self) -> None:
        old_umask = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._on_connect, path=str(self.path))
        finally:
            os.umask(old_umask)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        self.path.unlink(missing_ok=True)

    def _on_connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._connections.add(task)

        def end(_: asyncio.Task[None]) -> None:
            self._connections.discard(task)
            writer.close()  # also where the task was cancelled before it began

        task.add_done_callback(end)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        calls: dict[int, asyncio.Task[None]] = {}
        try:
            async for message in _messages(reader):
                kind, call_id = message[0], message[1]
                if kind == CALL:
                    task = asyncio.ensure_future(
                        self._run_call(writer, call_id, message[2], message[3])
                    )
                    calls[call_id] = task
                    task.add_done_callback(partial(_forget, calls, call_id))
                elif kind == CANCEL and call_id in calls:
                    calls[call_id].cancel()
        except (ConnectionError, msgpack.exceptions.UnpackException, ValueError) as error:
            log.warning("rpc connection dropped: %r", error)
        finally:
            running = list(calls.values())
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _run_call(
        self, writer: asyncio.StreamWriter, call_id: int, method: str, params: Params
    ) -> None:
        reply: list[Any] | None = None
        try:
            handler = self._handlers.get(method)
            if handler is None:
                raise RpcError(f"no method {method!r}; there are: {', '.join(self._handlers)}")
            outcome = handler(params)
            if inspect.isawaitable(outcome):
                reply = [DONE, call_id, await outcome]
            else:
                is_done = False
                async with contextlib.aclosing(outcome) as items:  # type: ignore[type-var]
                    async for item in items:
                        is_done = isinstance(item, Last)
                        kind, payload = (DONE, item.item) if is_done else (ITEM, item)
                        try:
                            writer.write(_pack([kind, call_id, payload]))
                            await writer.drain()
                        except ConnectionError:
                            return  # nobody is there to be told
                if not is_done:
                    reply = [DONE, call_id, None]
        except asyncio.CancelledError:
            reply = [ERROR, call_id, ["CancelledError", "cancelled"]]
        except ArealSubError as error:
            reply = [ERROR, call_id, [type(error).__name__, str(error)]]
        except Exception as error:  # its own `ConnectionError` among them: the caller waits
            log.exception("rpc method %s failed", method)
            reply = [ERROR, call_id, [type(error).__name__, str(error)]]
        if reply is not None:
            with contextlib.suppress(ConnectionError):
                writer.write(_pack(reply))
                await writer.drain()


class _Inbox:
    """What has come for one call and was not taken yet."""

    __slots__ = ("_arrived", "messages")

    def __init__(self) -> None:
        self.messages: deque[list[Any]] = deque()
        self._arrived: asyncio.Future[None] | None = None

    def put(self, message: list[Any]) -> None:
        self.messages.append(message)
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    async def get(self) -> list[Any]:
        if not self.messages:
            self._arrived = asyncio.get_running_loop().create_future()
            await self._arrived
            self._arrived = None
        return self.messages.popleft()


class _Connection(asyncio.Protocol):
    """A client's connection, and the calls that are under way on it."""

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self.inboxes: dict[int, _Inbox] = {}
        self.gone: PeerGone | None = None
        self.closed = asyncio.Event()
        self._full: set[int] = set()  # calls that lag; while there are any, nothing is read
        self._unpacker = msgpack.Unpacker(
            raw=False, strict_map_key=False, max_buffer_size=MAX_MESSAGE_BYTES
        )

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            self._unpacker.feed(data)
            for message in self._unpacker:
                self._deliver(message)
        except (msgpack.exceptions.UnpackException, ValueError) as error:
            self.end(f"broke the connection ({error!r})")

    def connection_lost(self, exc: Exception | None) -> None:
        self.end(f"broke the connection ({exc!r})" if exc else "closed the connection")
        self.closed.set()

    def send(self, message: list[Any]) -> None:
        if self.gone is None:
            self._transport.write(_pack(message))

    def end(self, reason: str) -> None:
        """All calls that are under way raise `PeerGone`; there are no others."""
        if self.gone is not None:
            return
        self.gone = PeerGone(f"{self._peer} {reason}")
        self._transport.abort()
        for call_id, inbox in self.inboxes.items():
            inbox.put([_GONE, call_id, [PeerGone.__name__, str(self.gone)]])

    async def take(self, call_id: int) -> list[Any]:
        """The call's next message."""
        inbox = self.inboxes[call_id]
        message = await inbox.get()
        if call_id in self._full and len(inbox.messages) < MAX_QUEUED_ITEMS:
            self._has_room(call_id)
        return message

    def forget(self, call_id: int) -> None:
        del self.inboxes[call_id]
        self._has_room(call_id)

    def _deliver(self, message: list[Any]) -> None:
        call_id = message[1]
        inbox = self.inboxes.get(call_id)
        if inbox is None:  # the call was cancelled meanwhile
            return
        inbox.put(message)
        if len(inbox.messages) >= MAX_QUEUED_ITEMS:
            if not self._full:
                self._transport.pause_reading()
            self._full.add(call_id)

    def _has_room(self, call_id: int) -> None:
        if call_id in self._full:
            self._full.remove(call_id)
            if not self._full and self.gone is None:
                self._transport.resume_reading()


class Client:
    """Calls a `Server`. Make it with `await Client.connect(path, peer="engine")`."""

    def __init__(self, path: Path, *, peer: str, redials: bool = False) -> None:
        """Not connected yet: `connect`, or with `redials` the first call, does that."""
        self.peer = peer
        self._path = path
        self.redials = redials
        self.is_closed = False
        self._dialing = asyncio.Lock()
        self._ids = itertools.count()
        self._connection: _Connection | None = None  # the last one

    @classmethod
    async def connect(
        cls, path: Path, *, peer: str, timeout_s: float = 60.0, redials: bool = False
    ) -> Client:
        """Connect, retrying until the peer listens. Raises `DeadlineExceeded` naming `peer`."""
        client = cls(path, peer=peer, redials=redials)
        try:
            async with asyncio.timeout(timeout_s):
                await client._dial()
        except TimeoutError:
            raise DeadlineExceeded(
                f"{peer} did not listen on {path} within {timeout_s} s"
            ) from None
        return client

    @property
    def is_connected(self) -> bool:
        return self._connection is not None and self._connection.gone is None

    async def close(self) -> None:
        """Calls that are under way, and later ones, raise `PeerGone`."""
        self.is_closed = True
        if self._connection is not None:
            self._connection.end("is called by nobody any more")
            await self._connection.closed.wait()

    async def _dial(self) -> _Connection:
        """A connection that is up. The deadline is the caller's. Raises `PeerGone` where this end
        is closed."""
        async with self._dialing:
            while not self.is_connected:
                if self.is_closed:
                    raise self._gone()
                try:
                    _, self._connection = await asyncio.get_running_loop().create_unix_connection(
                        lambda: _Connection(self.peer), str(self._path)
                    )
                except (FileNotFoundError, ConnectionRefusedError):
                    await asyncio.sleep(0.01)
            assert self._connection is not None
            return self._connection

    def _gone(self) -> PeerGone:
        gone = self._connection.gone if self._connection is not None else None
        return gone or PeerGone(f"{self.peer} was not called yet")

    async def call(
        self,
        method: str,
        params: Params | None = None,
        *,
        timeout_s: float,
        idempotent: bool = False,
        about: str = "",
    ) -> Any:
        """Call `method` and wait for its one payload. `about`: whose work it is, see `waits`.

        `idempotent`: where the peer goes meanwhile, the next one is asked, within the same limit.
        Raises `RpcError` (the far side's error), `PeerGone`, `DeadlineExceeded`.
        """
        with waiting(f"{self.peer}: {method}", timeout_s, about):
            try:
                async with asyncio.timeout(timeout_s):
                    while True:
                        try:
                            return await self._call(method, params)
                        except PeerGone:
                            if not (idempotent and self.redials) or self.is_closed:
                                raise
            except TimeoutError:
                raise DeadlineExceeded(
                    f"{self.peer} did not answer {method!r} within {timeout_s:g} s"
                ) from None

    async def _call(self, method: str, params: Params | None) -> Any:
        connection, call_id = await self._begin(method, params)
        try:
            kind, _, payload = await connection.take(call_id)
        except asyncio.CancelledError:
            connection.send([CANCEL, call_id])
            raise
        finally:
            connection.forget(call_id)
        if kind in (ERROR, _GONE):
            raise self._failure(kind, payload)
        return payload

    async def stream(self, method: str, params: Params | None = None) -> AsyncGenerator[Any, None]:
        """Call `method` and yield its items; closing the iterator cancels the call, where that is
        not done yet."""
        connection, call_id = await self._begin(method, params)
        kind = ITEM
        try:
            while kind == ITEM:
                kind, _, payload = await connection.take(call_id)
                if kind in (ERROR, _GONE):
                    raise self._failure(kind, payload)
                if kind == ITEM or payload is not None:
                    yield payload
        finally:
            connection.forget(call_id)
            if kind == ITEM:
                connection.send([CANCEL, call_id])

    async def _begin(self, method: str, params: Params | None) -> tuple[_Connection, int]:
        connection = self._connection
        if connection is None or connection.gone is not None:
            if not self.redials:
                raise self._gone()
            connection = await self._dial()
        call_id = next(self._ids)
        connection.inboxes[call_id] = _Inbox()
        connection.send([CALL, call_id, method, params or {}])
        return connection, call_id

    def _failure(self, message_kind: int, payload: list[str]) -> RpcError:
        kind, text = payload
        if message_kind == _GONE:
            return PeerGone(text)
        if kind == asyncio.CancelledError.__name__:  # not by us: who cancels does not read on
            return PeerGone(f"{self.peer} ended in an orderly way")
        return RpcError(f"{self.peer}: {kind}: {text}", kind=kind, text=text)
