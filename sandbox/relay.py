"""Inside gVisor: what the guardian is elsewhere. All that it is told and says is in frames.

    handle ── bridge ══ frames ══ relay ── zygote ── init ── agent
              outside  │ gVisor │  inside

The relay is the first process in there: when it ends, or its end of the frames does, the sandbox
and all that is in it end. It runs no agent code and is another user than those who do. Children's
pipes, their status and each connection to a child's listener go out as frames (`frames`).
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import sys
import traceback
from typing import Any, NoReturn

from . import kernel, outputs, plan, reaper, zygote
from .archive import Writer
from .folders import remove_tree
from .frames import (
    CHUNK_BYTES,
    CONNECTION,
    MAX_CONNECTIONS,
    STREAMS_PER_CHILD,
    Kind,
    Mux,
    Stream,
    Wire,
)
from .launch import memory_file
from .layers import unprivileged
from .wire import CHILD_READY, MAX_READY_BYTES, MAX_STATUS_BYTES

MAX_FROM_OUTSIDE_BYTES = 2**31
"""Settings and requests come whole, from a side that is trusted."""


def main() -> NoReturn:
    """Frames come on stdin and leave on stdout; stderr is the agent's. Returns in no process."""
    code = 1
    try:
        wire = Wire(os.dup(0), os.dup(1), MAX_FROM_OUTSIDE_BYTES)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(2, 1)
        os.close(null)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
        code = Relay(wire).run()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


class Relay:
    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._mux = Mux(wire)
        self._children: dict[int, _Child] = {}
        self._channel: socket.socket | None = None
        self._folder = ""
        self._user = -1
        self._zygote = -1
        self._num_connections = 0
        self._is_over = False

    def run(self) -> int:
        while not self._is_over:
            try:
                self._mux.turn(self._on_frames)
            except (EOFError, BrokenPipeError):  # nobody is there any more
                return 0
            for child in list(self._children.values()):
                self._settle(child)
        with contextlib.suppress(OSError):
            os.set_blocking(self._wire.writer, True)
            self._wire.flush()
        os.kill(self._zygote, 9)
        return reaper.shell_code(os.waitpid(self._zygote, 0)[1])

    def _on_frames(self, _: int) -> None:
        for kind, number, payload in self._wire.receive():
            if kind is Kind.SETTINGS:
                self._start(json.loads(payload))
            elif kind is Kind.ORDER:
                self._order(number)
            elif kind in (Kind.DATA, Kind.CREDIT, Kind.EOF):
                self._mux.dispatch(kind, number, payload)
            elif (child := self._children.get(number)) is not None:
                if kind is Kind.WORKSPACE:
                    child.add_workspace(payload)
                elif kind is Kind.OUTPUTS:
                    child.order_outputs(payload)
                elif kind is Kind.REQUEST:
                    child.send_request(payload)
                elif kind is Kind.END:
                    child.order_end()

    def _start(self, settings: dict[str, Any]) -> None:
        settings["plan"] = plan.from_json(settings["plan"])
        settings["group"] = ()
        steps = settings["plan"].zygote
        self._user = next(each.args["id"] for each in steps if each.layer == unprivileged.NAME)
        self._folder = settings["folder"]
        os.chmod(self._folder, 0o1777)
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            near.close()
            for fd in (self._wire.reader, self._wire.writer):
                os.close(fd)
            zygote.run(settings, far)
        far.close()
        self._channel, self._zygote = near, pid
        self._mux.watch(near.fileno(), selectors.EVENT_READ, self._on_channel)
        kernel.set_name("sandbox-relay")

    def _on_channel(self, _: int) -> None:
        assert self._channel is not None
        said = self._channel.recv(MAX_READY_BYTES)
        if said:
            self._wire.send(Kind.ZYGOTE, 0, said)
        else:
            self._is_over = True

    def _order(self, number: int) -> None:
        assert self._channel is not None
        control, far_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request, far_request = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pipes = [os.pipe() for _ in range(3)]
        far = [far_control.fileno(), far_request.fileno(), *(writer for _, writer in pipes)]
        order = json.dumps({"folder": f"{self._folder}/{number}"}).encode()
        try:
            socket.send_fds(self._channel, [order], far)
        finally:
            far_control.close()
            far_request.close()
            for _, writer in pipes:
                os.close(writer)
        streams = [
            Stream(self._mux, STREAMS_PER_CHILD * number + part, reader, reads=True)
            for part, (reader, _) in enumerate(pipes)
        ]
        child = _Child(number, control, request, streams)
        self._children[number] = child
        control.setblocking(False)
        self._mux.watch(control.fileno(), selectors.EVENT_READ, lambda _: self._on_control(child))

    def _on_control(self, child: _Child) -> None:
        fds: list[int] = []
        try:
            said, fds, _, _ = socket.recv_fds(child.control, MAX_STATUS_BYTES, 1)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        if said == CHILD_READY:
            self._wire.send(Kind.LISTENING if fds else Kind.READY, child.number)
        elif said:
            child.status = said
        else:
            child.is_over = True
            self._mux.watch(child.control.fileno(), 0, lambda _: None)
        for fd in fds:
            child.listener = socket.socket(fileno=fd)
            child.listener.setblocking(False)
            self._accept_from(child)

    def _accept_from(self, child: _Child) -> None:
        if child.listener is not None:
            open_ = selectors.EVENT_READ if child.num_connections < MAX_CONNECTIONS else 0
            self._mux.watch(child.listener.fileno(), open_, lambda _: self._accept(child))

    def _accept(self, child: _Child) -> None:
        assert child.listener is not None
        try:
            connection, _ = child.listener.accept()
        except OSError:  # it has gone away again
            return
        self._num_connections = (self._num_connections + 1) % CONNECTION
        number = CONNECTION | self._num_connections
        child.num_connections += 1

        def closed() -> None:
            child.num_connections -= 1
            self._accept_from(child)

        self._wire.send(Kind.CONNECT, number, child.number.to_bytes(4, "big"))
        Stream(self._mux, number, connection.detach(), reads=True, writes=True, on_closed=closed)
        self._accept_from(child)

    def _settle(self, child: _Child) -> None:
        """Its end is told after all that it wrote, unless it was ordered."""
        if child.status is None and not child.is_over:
            return
        if not child.was_ordered_to_end and not all(stream.is_dry() for stream in child.streams):
            return
        if child.status is not None and not child.was_told:
            child.was_told = True
            self._wire.send(Kind.STATUS, child.number, child.status)
        if not child.is_over:
            return
        if child.order and not child.is_collected:
            if not child.is_collecting:
                self._collect(child)
            return
        self._wire.send(Kind.END, child.number)
        for stream in child.streams:
            stream.close()
        if child.listener is not None:
            self._mux.watch(child.listener.fileno(), 0, lambda _: None)
            child.listener.close()
            child.listener = None
        child.control.close()
        child.request.close()
        del self._children[child.number]

    def _collect(self, child: _Child) -> None:
        """In a process that is the user whose files they are, and may do nothing else."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            _run_collector(self._user, f"{self._folder}/{child.number}", child.order, writer)
        os.close(writer)
        child.is_collecting = True

        def collected() -> None:
            os.waitpid(pid, 0)  # it is ending: nobody else has the pipe
            child.is_collected = True

        number = STREAMS_PER_CHILD * child.number + STREAMS_PER_CHILD - 1
        Stream(self._mux, number, reader, reads=True, on_closed=collected)


def _run_collector(user: int, folder: str, encoded: bytes, writer: int) -> NoReturn:
    """Write the archive of the outputs in `folder`, and remove that. Never returns."""
    code = 1
    try:
        kernel.close_all_descriptors_but({0, 1, 2, writer})
        kernel.set_name("sandbox-collect")
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        around, _, name = folder.rpartition("/")
        order = outputs.Order.decode(encoded)
        try:
            packed = outputs.collect(around, f"{name}/work", order)
        except OSError as error:
            packed = outputs.nothing(order, f"they cannot be collected: {error}")
        at = 0
        while sent := os.sendfile(writer, packed.fd, at, CHUNK_BYTES):
            at += sent
        remove_tree(folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


class _Child:
    def __init__(
        self, number: int, control: socket.socket, request: socket.socket, streams: list[Stream]
    ) -> None:
        self.number, self.control, self.request, self.streams = number, control, request, streams
        self.listener: socket.socket | None = None
        self.num_connections = 0
        self.workspace: Writer | None = None
        self.order = b""
        self.is_collecting = False
        self.is_collected = False
        self.status: bytes | None = None
        self.was_told = False
        self.was_ordered_to_end = False
        self.is_over = False

    def add_workspace(self, piece: bytes) -> None:
        if self.workspace is None:
            self.workspace = Writer("workspace")
        self.workspace.append(piece)

    def send_request(self, content: bytes) -> None:
        fds = [request := memory_file("request", content)]
        workspace = self.workspace.seal() if self.workspace is not None else None
        if workspace is not None:
            fds.append(workspace.fd)
        with contextlib.suppress(OSError):  # it is gone: its control connection says so, too
            socket.send_fds(self.request, [b"run"], fds)
        os.close(request)

    def order_outputs(self, order: bytes) -> None:
        """Told before the request: so its init leaves the folder to us."""
        self.order = order
        with contextlib.suppress(OSError):
            self.control.send(order)

    def order_end(self) -> None:
        self.was_ordered_to_end = True
        with contextlib.suppress(OSError):
            self.control.shutdown(socket.SHUT_WR)
