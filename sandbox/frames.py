"""Numbered streams and messages over one pair of pipes: how `bridge` and `relay` talk.

For a tier whose wall no descriptor crosses (gVisor). A frame is a kind, a number, a length and that
many bytes. Bytes of a stream are sent only within what the other side has said it has room for
(`CREDIT`), so one reader that is slow holds up nobody else, and what either side keeps in memory
has a bound. Nothing that comes is trusted for its size: what is beyond the rules is a `Breach`.
"""

from __future__ import annotations

import contextlib
import enum
import os
import selectors
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from typing import Any

from .archive import Archive, Writer

HEADER = struct.Struct("!BII")
WINDOW_BYTES = 256 * 1024
"""Of one stream, on the way and not yet taken by its reader."""
CHUNK_BYTES = 64 * 1024
CONNECTION = 1 << 31
"""Streams with this bit are connections to a child's listener; others are a child's own."""
STREAMS_PER_CHILD = 4
"""Its pipes, and as the last one the archive of its outputs."""
MAX_CONNECTIONS = 64
"""Open at once, of one child; more wait in the backlog of its listener."""


class Kind(enum.IntEnum):
    # To the relay. The number is the child's.
    SETTINGS = 1
    ORDER = 2
    REQUEST = 3
    WORKSPACE = 13  # its archive, in pieces, before the request
    OUTPUTS = 14  # the order for them, before the request
    # From the relay.
    ZYGOTE = 4  # what the zygote says of its import
    READY = 5  # sealed, without a listener
    LISTENING = 6  # sealed, with a listener
    STATUS = 7
    CONNECT = 8  # the number is the stream's, the payload the child's
    # Both ways.
    END = 9  # of a child: please, or it is
    DATA = 10
    CREDIT = 11
    EOF = 12


class Breach(Exception):
    """The other side does not keep to the rules."""


class Wire:
    """Frames over two descriptors, both of them non-blocking."""

    def __init__(self, reader: int, writer: int, max_payload_bytes: int) -> None:
        self.reader, self.writer = reader, writer
        self._max_payload_bytes = max_payload_bytes
        self._in = bytearray()
        self._out = bytearray()
        for fd in (reader, writer):
            os.set_blocking(fd, False)

    @property
    def has_pending(self) -> bool:
        return bool(self._out)

    def send(self, kind: Kind, number: int, payload: bytes = b"") -> None:
        self._out += HEADER.pack(kind, number, len(payload)) + payload

    def flush(self) -> None:
        """As much as goes. Raises `OSError` where nobody reads any more."""
        with contextlib.suppress(BlockingIOError):
            while self._out:
                del self._out[: os.write(self.writer, self._out[:CHUNK_BYTES])]

    def receive(self) -> Iterator[tuple[Kind, int, bytes]]:
        """The frames that are there. Raises `EOFError` at the end, and `Breach`."""
        try:
            chunk = os.read(self.reader, 4 * CHUNK_BYTES)
        except BlockingIOError:
            return
        if not chunk:
            raise EOFError
        self._in += chunk
        while len(self._in) >= HEADER.size:
            kind, number, length = HEADER.unpack_from(self._in)
            if length > self._max_payload_bytes:
                raise Breach(f"a frame of {length} bytes")
            end = HEADER.size + length
            if len(self._in) < end:
                return
            payload = bytes(self._in[HEADER.size : end])
            del self._in[:end]
            try:
                yield Kind(kind), number, payload
            except ValueError:
                raise Breach(f"a frame of the kind {kind}") from None


class Mux:
    """A selector, a wire and the streams over it."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.streams: dict[int, Stream | Incoming] = {}
        self._selector = selectors.DefaultSelector()

    def watch(self, fd: int, events: int, act: Callable[[int], None]) -> None:
        """Call `act` with what `fd` is ready for, of `events`; none: no more."""
        known = fd in self._selector.get_map()
        if not events:
            if known:  # and not modified: a closed pipe is reported whatever is asked for
                self._selector.unregister(fd)
        elif known:
            self._selector.modify(fd, events, act)
        else:
            self._selector.register(fd, events, act)

    def turn(self, act: Callable[[int], None]) -> None:
        """Wait for something and do it. `act`: where frames have come."""
        events = selectors.EVENT_READ
        self.watch(self.wire.reader, events, act)
        writing = selectors.EVENT_WRITE if self.wire.has_pending else 0
        self.watch(self.wire.writer, writing, lambda _: self.wire.flush())
        for key, ready in self._selector.select():
            if self._selector.get_map().get(key.fd) is key:  # not gone by what another one did
                key.data(ready)
        self.wire.flush()

    def dispatch(self, kind: Kind, number: int, payload: bytes) -> None:
        """A frame of a stream; one that has ended here is of no account."""
        stream = self.streams.get(number)
        if stream is None:
            return
        if kind is Kind.DATA:
            stream.take(payload)
        elif kind is Kind.CREDIT:
            stream.grant(payload)
        else:
            stream.take_eof()


class Stream:
    """One descriptor, ours, whose bytes go over the wire, or come from there, or both."""

    def __init__(
        self,
        mux: Mux,
        number: int,
        fd: int,
        *,
        reads: bool = False,
        writes: bool = False,
        on_closed: Callable[[], Any] = lambda: None,
    ) -> None:
        os.set_blocking(fd, False)
        self._mux, self._number, self._fd = mux, number, fd
        self._reads, self._writes = reads, writes
        self._credit = WINDOW_BYTES
        self._buffer = bytearray()
        self._is_broken = False  # nobody reads it: what comes is dropped
        self._eof_came = False
        self._on_closed = on_closed
        mux.streams[number] = self
        self._update()

    @property
    def is_flushed(self) -> bool:
        """Nothing that came is still to be written."""
        return not self._buffer

    def is_dry(self) -> bool:
        """There is nothing more to read, for now or at all."""
        if not self._reads:
            return True
        with selectors.DefaultSelector() as one:
            one.register(self._fd, selectors.EVENT_READ)
            return not one.select(0)

    def take(self, payload: bytes) -> None:
        if self._eof_came or not self._writes or len(self._buffer) + len(payload) > WINDOW_BYTES:
            raise Breach(f"more bytes than there is room for in the stream {self._number}")
        self._buffer += payload
        self._write()

    def grant(self, payload: bytes) -> None:
        if len(payload) != 4:
            raise Breach("a credit that is not a number")
        self._credit = min(WINDOW_BYTES, self._credit + int.from_bytes(payload, "big"))
        self._update()

    def take_eof(self) -> None:
        self._eof_came = True
        self._write()

    def close(self) -> None:
        """At once; what was to be written is lost."""
        if self._mux.streams.get(self._number) is self:
            self._mux.watch(self._fd, 0, self._act)
            del self._mux.streams[self._number]
            os.close(self._fd)
            self._on_closed()

    def _act(self, ready: int) -> None:
        if ready & selectors.EVENT_WRITE:
            self._write()
        if ready & selectors.EVENT_READ and self._reads and self._credit:
            self._read()

    def _read(self) -> None:
        try:
            chunk = os.read(self._fd, min(CHUNK_BYTES, self._credit))
        except BlockingIOError:
            return
        except OSError:  # the other end was reset
            chunk = b""
        if chunk:
            self._credit -= len(chunk)
            self._mux.wire.send(Kind.DATA, self._number, chunk)
        else:
            self._reads = False
            self._mux.wire.send(Kind.EOF, self._number)
        self._update()

    def _write(self) -> None:
        num_taken = 0
        try:
            while self._buffer and not self._is_broken:
                num = os.write(self._fd, self._buffer[:CHUNK_BYTES])
                del self._buffer[:num]
                num_taken += num
        except BlockingIOError:
            pass
        except OSError:
            self._is_broken = True
        if self._is_broken:
            num_taken += len(self._buffer)
            self._buffer.clear()
        if num_taken:
            self._mux.wire.send(Kind.CREDIT, self._number, num_taken.to_bytes(4, "big"))
        if self._eof_came and not self._buffer and self._writes:
            self._writes = False
            if stat.S_ISSOCK(os.fstat(self._fd).st_mode):
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._fd)) as end:
                    end.shutdown(socket.SHUT_WR)
        self._update()

    def _update(self) -> None:
        if not self._reads and not self._writes:
            self.close()
            return
        reading = selectors.EVENT_READ if self._reads and self._credit else 0
        writing = selectors.EVENT_WRITE if self._buffer else 0
        self._mux.watch(self._fd, reading | writing, self._act)


class Incoming:
    """A stream whose bytes go into a file, which nobody has to read in time."""

    def __init__(self, mux: Mux, number: int, max_bytes: int) -> None:
        self._mux, self._number, self._left = mux, number, max_bytes
        self._writer = Writer("outputs")
        self.whole: Archive | None = None
        """Once all of it has come. What is in it is not checked."""
        mux.streams[number] = self

    def take(self, payload: bytes) -> None:
        self._left -= len(payload)
        if self._left < 0:
            raise Breach(f"more bytes than were asked for in the stream {self._number}")
        self._writer.append(payload)
        self._mux.wire.send(Kind.CREDIT, self._number, len(payload).to_bytes(4, "big"))

    def grant(self, payload: bytes) -> None:
        raise Breach(f"a credit for the stream {self._number}, which only comes in")

    def take_eof(self) -> None:
        del self._mux.streams[self._number]
        self.whole = self._writer.seal()

    def close(self) -> None:
        """What is still to come is of no account."""
        self._mux.streams.pop(self._number, None)
