"""Calls between our own processes: msgpack messages over a Unix socket.

Who uses it: the trainer calls proxy (control plane), supervisor and engine; the proxy calls the
engine. Agents never can: the sockets lie in a 0700 directory that no child is told of.

One connection multiplexes any number of calls. Messages are msgpack arrays, back to back:

    caller  → callee   [CALL, id, method, params]      [CANCEL, id]
    callee  → caller   [ITEM, id, payload]*  then  [DONE, id, payload] | [ERROR, id, [kind, text]]

A handler is `async def h(params) -> payload`, or an async generator whose items stream to the
caller. Invariants: a call ends with exactly one DONE or ERROR; when either side goes away, all of
its calls end (the callee's handlers are cancelled, the caller's waits raise `PeerGone`); a message
larger than `MAX_MESSAGE_BYTES` ends the connection; writers wait for the socket to drain, so a slow
reader slows its writer instead of growing its memory. Every server answers `ping`, and `status`
with what its process waits for.

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
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
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


def _pack(message: list[Any]) -> bytes:
    packed: bytes = msgpack.packb(message, use_bin_type=True)
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
        task.add_done_callback(self._connections.discard)

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
            writer.close()

    async def _run_call(
        self, writer: asyncio.StreamWriter, call_id: int, method: str, params: Params
    ) -> None:
        reply: list[Any]
        try:
            handler = self._handlers.get(method)
            if handler is None:
                raise RpcError(f"no method {method!r}; there are: {', '.join(self._handlers)}")
            outcome = handler(params)
            if inspect.isawaitable(outcome):
                reply = [DONE, call_id, await outcome]
            else:
                async with contextlib.aclosing(outcome) as items:  # type: ignore[type-var]
                    async for item in items:
                        try:
                            writer.write(_pack([ITEM, call_id, item]))
                            await writer.drain()
                        except ConnectionError:
                            return  # nobody is there to be told
                reply = [DONE, call_id, None]
        except asyncio.CancelledError:
            reply = [ERROR, call_id, ["CancelledError", "cancelled"]]
        except ArealSubError as error:
            reply = [ERROR, call_id, [type(error).__name__, str(error)]]
        except Exception as error:  # its own `ConnectionError` among them: the caller waits
            log.exception("rpc method %s failed", method)
            reply = [ERROR, call_id, [type(error).__name__, str(error)]]
        with contextlib.suppress(ConnectionError):
            writer.write(_pack(reply))
            await writer.drain()


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
        self._queues: dict[int, asyncio.Queue[list[Any]]] = {}
        self._gone: PeerGone | None = PeerGone(f"{peer} was not called yet")
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None

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
        return self._gone is None

    async def close(self) -> None:
        """Calls that are under way, and later ones, raise `PeerGone`."""
        self.is_closed = True
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        if self._writer is not None:
            self._writer.close()

    async def _dial(self) -> None:
        """Connected, once this returns. The deadline is the caller's. Raises `PeerGone` where this
        end is closed."""
        async with self._dialing:
            while self._gone is not None:
                if self.is_closed:
                    raise self._gone
                try:
                    reader, writer = await asyncio.open_unix_connection(str(self._path))
                except (FileNotFoundError, ConnectionRefusedError):
                    await asyncio.sleep(0.01)
                else:
                    self._gone, self._writer = None, writer
                    self._reading = asyncio.ensure_future(self._read(reader, writer))

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
        call_id, queue = await self._begin(method, params)
        try:
            kind, _, payload = await queue.get()
        except asyncio.CancelledError:
            self._cancel(call_id)
            raise
        finally:
            self._queues.pop(call_id, None)
        if kind in (ERROR, _GONE):
            raise self._failure(kind, payload)
        return payload

    async def stream(self, method: str, params: Params | None = None) -> AsyncGenerator[Any, None]:
        """Call `method` and yield its items; closing the iterator cancels the call."""
        call_id, queue = await self._begin(method, params)
        finished = False
        try:
            while True:
                kind, _, payload = await queue.get()
                if kind == ITEM:
                    yield payload
                    continue
                finished = True
                if kind in (ERROR, _GONE):
                    raise self._failure(kind, payload)
                return
        finally:
            del self._queues[call_id]
            if not finished:
                self._cancel(call_id)
                while not queue.empty():  # the reader may be waiting for room in it
                    queue.get_nowait()

    async def _begin(
        self, method: str, params: Params | None
    ) -> tuple[int, asyncio.Queue[list[Any]]]:
        if self._gone is not None:
            if not self.redials:
                raise self._gone
            await self._dial()
        assert self._writer is not None
        call_id = next(self._ids)
        queue: asyncio.Queue[list[Any]] = asyncio.Queue(MAX_QUEUED_ITEMS)
        self._queues[call_id] = queue
        self._writer.write(_pack([CALL, call_id, method, params or {}]))
        return call_id, queue

    def _failure(self, message_kind: int, payload: list[str]) -> RpcError:
        kind, text = payload
        if message_kind == _GONE:
            return PeerGone(text)
        if kind == asyncio.CancelledError.__name__:  # not by us: who cancels does not read on
            return PeerGone(f"{self.peer} ended in an orderly way")
        return RpcError(f"{self.peer}: {kind}: {text}", kind=kind, text=text)

    def _cancel(self, call_id: int) -> None:
        writer = self._writer
        if self._gone is None and writer is not None and not writer.is_closing():
            writer.write(_pack([CANCEL, call_id]))

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reason = "closed the connection"
        try:
            async for message in _messages(reader):
                queue = self._queues.get(message[1])
                if queue is not None:  # None: the call was cancelled meanwhile
                    await queue.put(message)
        except (ConnectionError, msgpack.exceptions.UnpackException, ValueError) as error:
            reason = f"broke the connection ({error!r})"
        finally:
            self._gone = PeerGone(f"{self.peer} {reason}")
            writer.close()
            for call_id, queue in self._queues.items():
                while queue.full():
                    queue.get_nowait()
                queue.put_nowait([_GONE, call_id, [PeerGone.__name__, str(self._gone)]])
