"""uvicorn's HTTP connection, with bounds, and with a way to end what its agent asked for.

uvicorn reads heads of any size at any speed, and waits for ever for who does not read. Here a head
may have `MAX_HEAD_BYTES` and must be complete `HEAD_TIMEOUT_S` after its connection was opened or
its first byte came, and who takes nothing of an answer for `SEND_TIMEOUT_S` is let go. What follows
a body (trailers) is not kept, and bounded like a head. What is read at a time has at most
`MAX_PARTS` fields and chunks, so that it takes the loop a few milliseconds. Nothing is read while
requests wait for the answer to an earlier one, `MAX_WAITING` of them at most. A listener has at
most as many connections as it was given room for (`Connections`), so no rollout can take the
descriptors that others need.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import time
from collections import deque
from collections.abc import Callable, Sized
from typing import Any

import httptools
from starlette.requests import ClientDisconnect, Request
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEAD_BYTES = 64 * 2**10
HEAD_TIMEOUT_S = 30.0
SEND_TIMEOUT_S = 300.0
MAX_WAITING = 256
"""Of one connection. One read may hold thousands."""
MAX_PARTS = 2048
"""Of what is read at a time, 256 KB at most, which would hold forty thousand chunks of a byte."""
_STATE_KEY = "line"
"""Under which a request's `scope["state"]` holds the `Line` that it came by."""
_ARRIVED_KEY = "arrived"
"""There once the whole request is."""
# For the journal, the engine, the control plane, listeners and whatever else is no connection.
NUM_OTHER_FILES = 192
MIN_CONNECTIONS, MAX_FILES = 16, 2**20

# A connection that was opened, or answered, this lately is not cut: its next request is on its way.
GRACE_S = 0.25
MAKE_ROOM_S = 0.1

log = logging.getLogger(__name__)


def num_connections() -> int:
    """How many this process may have: as many descriptors as it can get, less what it needs."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if most == resource.RLIM_INFINITY:
        return MAX_FILES
    return max(MIN_CONNECTIONS, most - NUM_OTHER_FILES)


class Connections:
    """Those of one listener, at most as many as `room` says. Where that is reached, one that is
    idle makes room for the next: first who never had an answer, then who was idle for longest.
    Where none is, whoever comes waits in the listener's backlog."""

    def __init__(self, whose: str, room: Callable[[], int]) -> None:
        self._whose = whose
        self._room = room
        # With the time that each came, and was last answered: in this order, too.
        self._new: dict[BoundedHttpProtocol, float] = {}
        self._known: dict[BoundedHttpProtocol, float] = {}
        self._freed = asyncio.Event()
        self._has_told = False

    async def accept(
        self, listener: socket.socket, make_protocol: Callable[[Connections], asyncio.Protocol]
    ) -> None:
        """Until cancelled, which closes the listener."""
        loop = asyncio.get_running_loop()
        with listener:
            while True:
                try:
                    opened, _ = await loop.sock_accept(listener)
                    with contextlib.ExitStack() as closing:
                        closing.enter_context(opened)
                        await self._until_there_is_room()
                        closing.pop_all()
                    await loop.connect_accepted_socket(lambda: make_protocol(self), opened)
                except ConnectionError:
                    continue  # it hung up before it was let in
                except Exception as error:  # whatever it is: others still have to get in
                    log.warning("%s: a connection was not accepted: %r", self._whose, error)
                    await asyncio.sleep(MAKE_ROOM_S)

    def add(self, connection: BoundedHttpProtocol) -> None:
        self._new[connection] = time.monotonic()

    def note_answer(self, connection: BoundedHttpProtocol) -> None:
        self.discard(connection)
        self._known[connection] = time.monotonic()

    def discard(self, connection: BoundedHttpProtocol) -> None:
        self._new.pop(connection, None)
        self._known.pop(connection, None)
        self._freed.set()

    async def _until_there_is_room(self) -> None:
        while len(self._new) + len(self._known) >= self._room() and not self._cut_one():
            self._freed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._freed.wait(), MAKE_ROOM_S)

    def _cut_one(self) -> bool:
        if not self._has_told:
            self._has_told = True
            log.warning("%s has %d connections: idle ones are cut", self._whose, self._room())
        before = time.monotonic() - GRACE_S
        for group in (self._new, self._known):
            for connection, since in group.items():
                if since > before:
                    break
                if connection.is_idle:
                    self.discard(connection)
                    connection.transport.abort()
                    return True
        return False


class Line:
    """A connection, as far as the one who answers on it sees it."""

    def __init__(self) -> None:
        self.is_lost = False
        self._answering: asyncio.Task[Any] | None = None

    def __enter__(self) -> None:
        """Until the block's end, have its task cancelled where the connection is lost. The block
        then raises `ClientDisconnect`."""
        if self.is_lost:
            raise ClientDisconnect
        self._answering = asyncio.current_task()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        task, self._answering = self._answering, None
        if kind is asyncio.CancelledError and self.is_lost and task and task.uncancel() == 0:
            raise ClientDisconnect from None

    def lost(self) -> None:
        self.is_lost = True
        if self._answering is not None:
            self._answering.cancel()


class _AnswerTransport(asyncio.Transport):
    """What one answer is written to. Its head waits for the first of its body: one packet less, for
    which its agent wakes up."""

    def __init__(self, transport: asyncio.Transport, cycle: RequestResponseCycle) -> None:
        super().__init__()
        self._transport = transport
        self._cycle = cycle
        self._head: bytes | None = None  # as long as it waits
        self._has_begun = False

    def write(self, data: Any) -> None:
        # Before that, uvicorn asks the agent to go on with a body ("100 Continue").
        if self._cycle.response_started and not self._has_begun:
            self._has_begun, self._head = True, data
        elif self._head is not None:
            data, self._head = self._head + data, None
            self._transport.write(data)
        else:
            self._transport.write(data)

    def flush(self) -> None:
        if self._head is not None:
            self.write(b"")

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()


class TooManyRequests(Exception):
    """On one connection; told to the parser, which stops there."""


class TooManyParts(Exception):
    """Within what was read at once; told to the parser, too."""


class _Parser:
    """httptools' parser; where another protocol is offered, it goes on in the one that is spoken.

    On its own it takes all behind such a head for the other protocol, bodies too. Java's client
    offers HTTP/2 with its first request, and sends it in HTTP/1.1.
    """

    def __init__(self, protocol: BoundedHttpProtocol) -> None:
        self._protocol = protocol
        self._renew()

    def feed_data(self, data: bytes) -> None:
        while True:
            try:
                return self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as offer:
                head = self._protocol.decline()
                if head is None:
                    raise
                data = head + data[offer.args[0] :]
                self._renew()

    def _renew(self) -> None:
        self._parser = httptools.HttpRequestParser(self._protocol)
        with contextlib.suppress(AttributeError):  # httptools < 0.6.3
            self._parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        self.get_http_version = self._parser.get_http_version
        self.get_method = self._parser.get_method
        self.should_keep_alive = self._parser.should_keep_alive
        self.should_upgrade = self._parser.should_upgrade


class _Flow(FlowControl):
    """Reads no more while requests wait: uvicorn's does, with each that begins."""

    def __init__(self, transport: asyncio.Transport, waiting: Sized) -> None:
        super().__init__(transport)
        self._waiting = waiting

    def resume_reading(self) -> None:
        if not self._waiting:
            super().resume_reading()


class BoundedHttpProtocol(HttpToolsProtocol):
    def __init__(self, *args: Any, among: Connections, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parser = _Parser(self)  # type: ignore[assignment]
        self._offers: bytes | None = None  # a head that offers another protocol, without the offer
        self._among = among
        # Of requests, in order, and what their answers are written to.
        self._unanswered: deque[tuple[RequestResponseCycle, _AnswerTransport]] = deque()
        self._line = Line()
        self.app_state = {**self.app_state, _STATE_KEY: self._line}
        self._num_head_bytes = 0  # or of what else is no body, since the last of a body came
        self._is_in_head = self._is_in_message = self._has_body = False
        self._num_parts = 0  # of what is being read
        self._head_timeout: asyncio.TimerHandle | None = None
        self._send_timeout: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport, self.pipeline)
        self._expect_head()
        self._among.add(self)

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered; half a head is none."""
        return self.cycle is None or self.cycle.response_complete

    def connection_lost(self, exc: Exception | None) -> None:
        self._among.discard(self)
        self._head_arrived()
        for cycle, _ in self._unanswered:  # uvicorn tells the last one only
            cycle.disconnected = True
            cycle.message_event.set()
        self._taken()
        super().connection_lost(exc)
        self._line.lost()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._send_timeout = self.loop.call_later(SEND_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._taken()

    def data_received(self, data: bytes) -> None:
        was_in_head = self._is_in_head
        was_in_message = self._is_in_message
        self._has_body = False
        self._num_parts = 0
        super().data_received(data)
        if self._has_body or not self._is_in_message:
            self._num_head_bytes = 0
            return
        if self._is_in_head and self._head_timeout is None:
            self._expect_head()
        # One read (256 KB at most) may hold more than a head, so a head within one read passes.
        goes_on = was_in_head if self._is_in_head else was_in_message
        self._num_head_bytes = self._num_head_bytes + len(data) if goes_on else len(data)
        if self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("Request head too large.")

    def on_message_begin(self) -> None:
        self._is_in_head = self._is_in_message = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_part()
        if self._is_in_head:  # else a trailer: nobody asks for them, and their number is unbounded
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._count_part()
        self._has_body = True
        super().on_body(body)

    def _count_part(self) -> None:
        self._num_parts += 1
        if self._num_parts > MAX_PARTS:
            raise TooManyParts

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MAX_WAITING:
            raise TooManyRequests
        self._head_arrived()
        method = self.parser.get_method()
        if self.parser.should_upgrade() and method != b"CONNECT":
            line = b"%s %s HTTP/%s" % (method, self.url, self.parser.get_http_version().encode())
            kept = [b"%s: %s" % each for each in self.headers if each[0] != b"connection"]
            self._offers = b"\r\n".join([line, *kept, b"\r\n"])
            return
        super().on_headers_complete()
        answer = _AnswerTransport(self.transport, self.cycle)
        self.cycle.transport = answer
        self._unanswered.append((self.cycle, answer))

    def decline(self) -> bytes | None:
        """What is parsed instead of a head that offered another protocol; None: none did."""
        head, self._offers = self._offers, None
        return head

    def on_message_complete(self) -> None:
        if self._offers is not None:
            return
        self._is_in_message = False
        super().on_message_complete()
        self.scope["state"][_ARRIVED_KEY] = True

    def on_response_complete(self) -> None:
        _, answer = self._unanswered.popleft()
        answer.flush()
        if not self.transport.is_closing():
            self._among.note_answer(self)
        super().on_response_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """Not worth a line: an agent tried CONNECT."""

    def _expect_head(self) -> None:
        self._head_timeout = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)

    def _head_arrived(self) -> None:
        self._is_in_head = False
        if self._head_timeout is not None:
            self._head_timeout.cancel()
            self._head_timeout = None

    def _taken(self) -> None:
        if self._send_timeout is not None:
            self._send_timeout.cancel()
            self._send_timeout = None

    def _give_up(self) -> None:
        self._head_timeout = None
        self.transport.close()


def has_arrived(request: Request) -> bool:
    """Whether the whole of it is here, as it mostly is when its head is."""
    return _ARRIVED_KEY in request.scope["state"]


def until_hung_up(request: Request) -> Line:
    """With it, a block is cancelled, and raises `ClientDisconnect`, where the agent hangs up."""
    line: Line = request.scope["state"][_STATE_KEY]
    return line
