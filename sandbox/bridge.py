"""Outside gVisor: stands where the guardian does, and carries what a descriptor cannot.

Started by `launch`. It runs nothing of the agent's; it starts `runsc` around the relay, and what
`handle` sends and gets through descriptors (orders, requests, output, status) it sends and gets
through frames. What comes from in there is hostile in the end: every frame is checked, and one
against the rules ends everything.

A listener in there cannot be handed out. Instead one is made for each child in a network of the
bridge's own, which nobody else is in, and each connection that the relay tells of is made to it: so
a connection says which child it is of, as it does elsewhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import traceback
from typing import Any, NoReturn

from . import kernel, outputs
from .archive import Archive
from .frames import (
    CHUNK_BYTES,
    CONNECTION,
    MAX_CONNECTIONS,
    STREAMS_PER_CHILD,
    Breach,
    Incoming,
    Kind,
    Mux,
    Stream,
    Wire,
)
from .layers import Context, loopback
from .wire import (
    CHILD_READY,
    MAX_DESCRIPTORS,
    MAX_ORDER_BYTES,
    MAX_READY_BYTES,
    MAX_STATUS_BYTES,
    Descriptors,
)

END_TIMEOUT_S = 5.0
KILLED_CODE = 137


def main(channel_fd: int, lifeline_fd: int) -> NoReturn:
    """Settings as JSON on stdin: `inside` (the zygote's), `command` and `delete`
    (`gvisor.prepare`'s). Returns in no process."""
    code = 1
    try:
        with open(0, "rb") as file:
            settings = json.load(file)
        os.open(os.devnull, os.O_RDONLY)  # becomes descriptor 0
        kernel.set_name("sandbox-bridge")
        inside = subprocess.Popen(
            settings["command"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Not our TMPDIR: runsc as root puts there what its unprivileged part has to open.
            env={"PATH": os.defpath},
            start_new_session=True,
            preexec_fn=_die_with_parent,  # there are no threads here
        )
        assert inside.stdin is not None and inside.stdout is not None
        try:
            _own_network()
            wire = Wire(inside.stdout.fileno(), inside.stdin.fileno(), MAX_READY_BYTES)
            wire.send(Kind.SETTINGS, 0, json.dumps(settings["inside"]).encode())
            bridge = Bridge(
                wire, socket.socket(fileno=channel_fd), socket.socket(fileno=lifeline_fd)
            )
            ended_by_caller = bridge.run()
        finally:
            code = _end(inside, settings["delete"])
        if ended_by_caller:
            code = KILLED_CODE
    except Breach as breach:
        sys.stderr.write(f"the relay did not keep to the rules: {breach}\n")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _die_with_parent() -> None:
    kernel.die_with_parent(9)


def _own_network() -> None:
    uid, gid = os.getuid(), os.getgid()
    if uid == 0:
        kernel.unshare(kernel.CLONE_NEWNET)
    else:
        kernel.unshare(kernel.CLONE_NEWUSER | kernel.CLONE_NEWNET)
        kernel.map_user("self", uid, uid, gid)
    loopback.apply({"ports": []}, Context())


def _end(inside: subprocess.Popen[bytes], delete: list[str]) -> int:
    """See it end. Returns its exit code."""
    assert inside.stdin is not None
    with contextlib.suppress(OSError):
        inside.stdin.close()  # for the relay, this is the end
    try:
        code = inside.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        inside.kill()
        code = inside.wait()
    if delete:
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                delete,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=END_TIMEOUT_S,
                check=False,
            )
    return 128 - code if code < 0 else code


class Bridge:
    def __init__(self, wire: Wire, channel: socket.socket, lifeline: socket.socket) -> None:
        self._wire = wire
        self._mux = Mux(wire)
        self._channel, self._lifeline = channel, lifeline
        self._children: dict[int, _Child] = {}
        self._num_children = 0
        self._was_ended = False
        self._said_ready = False
        self._mux.watch(channel.fileno(), selectors.EVENT_READ, self._on_order)
        self._mux.watch(lifeline.fileno(), selectors.EVENT_READ, self._on_lifeline)

    def run(self) -> bool:
        """True: the caller ended it; False: the other side did. Raises `Breach`."""
        while not self._was_ended:
            try:
                self._mux.turn(self._on_frames)
            except (EOFError, BrokenPipeError):
                return False
            for child in list(self._children.values()):
                self._settle(child)
        return True

    def _on_lifeline(self, _: int) -> None:
        self._was_ended = True

    def _on_order(self, _: int) -> None:
        message, fds, _, _ = socket.recv_fds(self._channel, MAX_ORDER_BYTES, MAX_DESCRIPTORS)
        if not message:
            self._was_ended = True
            return
        received = Descriptors.of(fds)
        self._num_children += 1
        number = self._num_children
        pipes = (received.stdout, received.stderr, received.result)
        streams = [
            Stream(self._mux, STREAMS_PER_CHILD * number + part, fd, writes=True)
            for part, fd in enumerate(pipes)
        ]
        child = _Child(
            number,
            socket.socket(fileno=received.control),
            socket.socket(fileno=received.request),
            streams,
        )
        self._children[number] = child
        read = selectors.EVENT_READ
        self._mux.watch(received.control, read, lambda _: self._on_control(child))
        self._mux.watch(received.request, read, lambda _: self._on_request(child))
        self._wire.send(Kind.ORDER, number)

    def _on_control(self, child: _Child) -> None:
        """The order for outputs, or the connection's end: the child has to end, too."""
        message = b""
        with contextlib.suppress(OSError):
            message = child.control.recv(outputs.MAX_ORDER_BYTES)
        if message:
            most = outputs.max_archive_bytes(outputs.Order.decode(message))
            number = STREAMS_PER_CHILD * child.number + STREAMS_PER_CHILD - 1
            child.outputs = Incoming(self._mux, number, most)
            self._wire.send(Kind.OUTPUTS, child.number, message)
            return
        self._mux.watch(child.control.fileno(), 0, lambda _: None)
        child.was_ordered_to_end = True
        self._wire.send(Kind.END, child.number)

    def _on_request(self, child: _Child) -> None:
        self._mux.watch(child.request.fileno(), 0, lambda _: None)
        _, fds, _, _ = socket.recv_fds(child.request, 16, 2)
        if len(fds) > 1:  # first: the request starts the child
            self._send_file(Kind.WORKSPACE, child, fds[1])
        if fds:
            with open(fds[0], "rb") as file:
                self._wire.send(Kind.REQUEST, child.number, file.read())

    def _send_file(self, kind: Kind, child: _Child, fd: int) -> None:
        """In pieces, by position: others read the same one."""
        at = 0
        while piece := os.pread(fd, CHUNK_BYTES, at):
            self._wire.send(kind, child.number, piece)
            at += len(piece)
        os.close(fd)

    def _on_frames(self, _: int) -> None:
        for kind, number, payload in self._wire.receive():
            if kind in (Kind.DATA, Kind.CREDIT, Kind.EOF):
                if len(payload) > CHUNK_BYTES:
                    raise Breach(f"a chunk of {len(payload)} bytes")
                self._mux.dispatch(kind, number, payload)
            elif kind is Kind.ZYGOTE and not self._said_ready:
                self._said_ready = True
                self._channel.send(payload)
            elif kind is Kind.CONNECT:
                self._connect(number, int.from_bytes(payload, "big"))
            elif (child := self._children.get(number)) is None:
                raise Breach(f"a frame of the kind {kind.name} for a child that there is not")
            else:
                self._on_childs_frame(child, kind, payload)

    def _on_childs_frame(self, child: _Child, kind: Kind, payload: bytes) -> None:
        if kind in (Kind.READY, Kind.LISTENING) and not child.is_ready:
            child.is_ready = True
            fds = []
            if kind is Kind.LISTENING:
                listener = socket.create_server(("127.0.0.1", 0), backlog=loopback.BACKLOG)
                listener.setblocking(False)
                child.address = listener.getsockname()
                fds = [listener.detach()]
            with contextlib.suppress(OSError):  # the caller is not interested any more
                socket.send_fds(child.control, [CHILD_READY], fds)
            for fd in fds:
                os.close(fd)
        elif kind is Kind.STATUS and child.status is None and len(payload) <= MAX_STATUS_BYTES:
            child.status = payload
        elif kind is Kind.END:
            child.is_over = True
        else:
            raise Breach(f"an unexpected frame of the kind {kind.name}")

    def _connect(self, number: int, of: int) -> None:
        child = self._children.get(of)
        if child is None or child.address is None:
            raise Breach("a connection to a listener that there is not")
        if not number & CONNECTION or number in self._mux.streams:
            raise Breach(f"a connection with the number {number}")
        if child.num_connections >= 4 * MAX_CONNECTIONS:  # of an end each side hears in its time
            raise Breach("more connections than a child may have")
        child.num_connections += 1
        connection = socket.socket()
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            connection.connect_ex(child.address)  # where nobody listens, reading from it fails

        def closed() -> None:
            child.num_connections -= 1

        Stream(self._mux, number, connection.detach(), reads=True, writes=True, on_closed=closed)

    def _settle(self, child: _Child) -> None:
        """Its end is told after all that it wrote, unless nobody waits for that."""
        if child.status is None and not child.is_over:
            return
        if not child.was_ordered_to_end and not all(one.is_flushed for one in child.streams):
            return
        if child.status is not None and not child.was_told:
            child.was_told = True
            with contextlib.suppress(OSError):
                child.control.send(child.status)
        if not child.is_over:
            return
        if child.outputs is not None:
            child.outputs.close()
            if child.was_told:
                self._hand_out(child, child.outputs.whole)
        for stream in child.streams:
            stream.close()
        for end in (child.control, child.request):
            self._mux.watch(end.fileno(), 0, lambda _: None)
            end.close()
        del self._children[child.number]

    def _hand_out(self, child: _Child, packed: Archive | None) -> None:
        with contextlib.suppress(OSError):
            if packed is None:
                child.control.send(outputs.COLLECTED + b"\nthey did not come out of gVisor")
            else:
                socket.send_fds(child.control, [outputs.COLLECTED], [packed.fd])


class _Child:
    def __init__(
        self, number: int, control: socket.socket, request: socket.socket, streams: list[Stream]
    ) -> None:
        self.number, self.control, self.request, self.streams = number, control, request, streams
        self.address: Any = None
        self.outputs: Incoming | None = None
        self.num_connections = 0
        self.is_ready = False
        self.status: bytes | None = None
        self.was_told = False
        self.was_ordered_to_end = False
        self.is_over = False
