"""The egress proxy: the process through which children reach what the allowlist names, if anything.

One per zygote, started by `egress_handle` in the caller's network, sealed by the plan's stage
`egress` before it hears of any child. Each child's listener comes with a *leash*; a connection that
arrives there is of that child. Speaks HTTP's two ways: CONNECT (bytes both ways) and `http://` URLs
(one request per connection). Names are held against the list before they are resolved, addresses
after that, and the connection goes to an address that was checked.

Invariants: no environment, no secrets; every wait on a peer has a deadline; what it holds in memory
is bounded per child; when a leash ends, every connection of that child is cut, and what was refused
is told; when the channel ends, so does this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import resource
import socket
import traceback
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

from . import kernel, plan
from .allowlist import Allowlist, HostPort
from .http_head import BadHead, Request, parse_answer, parse_request
from .interpreter import interpreter_paths
from .layers import Context
from .run import settle
from .wire import MAX_LINE_CHARS, MAX_REFUSED, OTHERS, shorten

MAX_HEAD_BYTES = 32 * 1024
HEAD_TIMEOUT_S = 10.0
LOOKUP_TIMEOUT_S = 15.0
CONNECT_TIMEOUT_S = 15.0
"""Of all addresses of a name together; one may take a third of it."""
IDLE_TIMEOUT_S = 300.0
"""Nothing in either direction."""
CLOSE_TIMEOUT_S = 5.0
LINGER_S = 1.0
"""How long what a client still sends is thrown away, so that it can read why."""
MAX_CONNECTIONS = 64
"""Of one child at a time; more wait in the backlog of its listener."""
MAX_LOOKUPS = 4
"""Of one child at a time."""
NUM_LOOKUP_THREADS = 32
ACCEPT_PAUSE_S = 0.1
COPY_BYTES = 64 * 1024


class Refused(Exception):
    """The answer to the client: a status, and a sentence that fits into its first line."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def main(channel_fd: int) -> NoReturn:
    """Settings as JSON on stdin: `steps`, `allow`. Says "ready", or what failed. Never returns."""
    code = 1
    channel = socket.socket(fileno=channel_fd)
    try:
        with open(0, "rb") as file:
            settings = json.load(file)
        os.open(os.devnull, os.O_RDONLY)  # becomes descriptor 0
        kernel.set_name("sandbox-egress")
        _, num_files = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (num_files, num_files))
        steps = [plan.Step(**step) for step in settings["steps"]]
        try:
            plan.apply(steps, Context(readable=interpreter_paths()))
        except Exception as error:
            channel.send(json.dumps({"error": shorten(str(error), MAX_LINE_CHARS)}).encode())
        else:
            channel.send(b'{"ready": true}')
            # Two descriptors each; the rest is for listeners and leashes.
            egress = Egress(Allowlist(settings["allow"]), num_connections=num_files // 4)
            asyncio.run(egress.serve(channel))
            code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # without waiting for a lookup that hangs


class Egress:
    """All children of one zygote."""

    def __init__(self, allowlist: Allowlist, *, num_connections: int) -> None:
        self.allowlist = allowlist
        self.slots = asyncio.Semaphore(num_connections)
        self.threads = ThreadPoolExecutor(NUM_LOOKUP_THREADS)
        self._children: set[asyncio.Task[None]] = set()

    async def serve(self, channel: socket.socket) -> None:
        """Until the channel ends."""
        channel.setblocking(False)
        while True:
            await _readable(channel)
            try:
                message, fds, _, _ = socket.recv_fds(channel, 16, 2)
            except BlockingIOError:
                continue
            if not message:
                return
            if len(fds) != 2:
                raise RuntimeError("a child came without its listener and its leash")
            listener, leash = (socket.socket(fileno=fd) for fd in fds)
            task = asyncio.ensure_future(Child(self, listener).serve(leash))
            self._children.add(task)
            task.add_done_callback(self._children.discard)


class Child:
    """The connections of one child, and what it was refused."""

    def __init__(self, egress: Egress, listener: socket.socket) -> None:
        self._egress = egress
        self._listener = listener
        self._slots = asyncio.Semaphore(MAX_CONNECTIONS)
        self._lookups = asyncio.Semaphore(MAX_LOOKUPS)
        self._tasks: set[asyncio.Task[None]] = set()
        self._refused: dict[str, int] = {}
        self._loop = asyncio.get_running_loop()

    async def serve(self, leash: socket.socket) -> None:
        leash.setblocking(False)
        self._listener.setblocking(False)
        accepting = asyncio.ensure_future(self._accept())
        with leash, self._listener:
            with contextlib.suppress(OSError):
                await self._loop.sock_recv(leash, 1)  # nothing ever comes: its end is the child's
            tasks = [accepting, *self._tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with contextlib.suppress(OSError):  # whoever wanted to know may be gone
                leash.send(json.dumps(self._refused).encode())

    async def _accept(self) -> None:
        while True:
            await self._slots.acquire()
            connection = await self._accepted()
            try:
                await self._egress.slots.acquire()
            except BaseException:
                connection.close()
                raise
            task = asyncio.ensure_future(self._serve_connection(connection))
            self._tasks.add(task)
            task.add_done_callback(self._on_connection_over)

    async def _accepted(self) -> socket.socket:
        while True:
            try:
                return (await self._loop.sock_accept(self._listener))[0]
            except OSError:  # the client has gone, or there are no descriptors for now
                await asyncio.sleep(ACCEPT_PAUSE_S)

    def _on_connection_over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._slots.release()
        self._egress.slots.release()

    async def _serve_connection(self, connection: socket.socket) -> None:
        async with _opened(sock=connection, limit=MAX_HEAD_BYTES) as (reader, writer):
            try:
                await self._answer(reader, writer)
            except Refused as refusal:
                await _say(refusal, reader, writer)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await _request(reader)
        address = await self._address(request.wanted)
        async with _connected(address, request.wanted) as (from_server, to_server):
            self._check_peer(to_server, request.wanted)
            async with asyncio.timeout(IDLE_TIMEOUT_S) as idle:
                if request.head is None:
                    writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                    # The end of one direction is passed on, and the other may go on.
                    there = _copy(reader, to_server, idle)
                    back = _copy(from_server, writer, idle)
                    await _until(asyncio.FIRST_EXCEPTION, there, back)
                else:
                    to_server.write(request.head)
                    there = _send_body(reader, to_server, request.body_bytes, idle)
                    back = _send_answer(from_server, writer, idle)
                    await _until(asyncio.FIRST_COMPLETED, there, back)

    async def _address(self, wanted: HostPort) -> Sequence[str]:
        """Where to connect. Raises `Refused`."""
        allowlist = self._egress.allowlist
        if not allowlist.names(wanted):
            raise self._refuse(wanted, "is not allowed: see sandbox.network.allow")
        try:
            async with asyncio.timeout(LOOKUP_TIMEOUT_S):
                found = await self._look_up(wanted)
        except TimeoutError:
            raise Refused(504, f"{wanted}: its name was not resolved in time") from None
        except OSError as error:
            raise Refused(502, f"{wanted}: its name cannot be resolved: {error.strerror}") from None
        reached = [address for address in found if allowlist.reaches(address, wanted.port)]
        if not reached:
            raise self._refuse(
                wanted,
                f"is at {found[0]}, which is not public: "
                f"allowed only where sandbox.network.allow lists {HostPort(found[0], wanted.port)}",
            )
        return reached

    async def _look_up(self, wanted: HostPort) -> list[str]:
        await self._lookups.acquire()
        looking = self._loop.run_in_executor(self._egress.threads, _addresses, wanted)
        looking.add_done_callback(self._on_looked_up)
        # Shielded: a thread that was given up still counts until it is done.
        return await asyncio.shield(looking)

    def _on_looked_up(self, looking: asyncio.Future[list[str]]) -> None:
        self._lookups.release()
        looking.exception()  # nobody may be waiting for it any more

    def _check_peer(self, to_server: asyncio.StreamWriter, wanted: HostPort) -> None:
        """A public address may be this machine's own, with services meant for it alone."""
        ends = [to_server.get_extra_info(name) for name in ("sockname", "peername")]
        if None in ends:  # it was reset at once
            raise Refused(502, f"{wanted}: no connection: {os.strerror(errno.ECONNRESET)}")
        own, peer = (end[0] for end in ends)
        if own == peer and not self._egress.allowlist.lists(peer, wanted.port):
            raise self._refuse(
                wanted,
                "is this machine itself: "
                f"allowed only where sandbox.network.allow lists {HostPort(peer, wanted.port)}",
            )

    def _refuse(self, wanted: HostPort, why: str) -> Refused:
        name = str(wanted)
        if name not in self._refused and len(self._refused) >= MAX_REFUSED:
            name = OTHERS
        self._refused[name] = self._refused.get(name, 0) + 1
        return Refused(403, f"{wanted} {why}")


def _addresses(wanted: HostPort) -> list[str]:
    """In a thread. Raises `OSError`."""
    found = socket.getaddrinfo(wanted.host.encode(), wanted.port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


async def _request(reader: asyncio.StreamReader) -> Request:
    """Raises `Refused`, and `EOFError` where the client has gone."""
    try:
        async with asyncio.timeout(HEAD_TIMEOUT_S):
            return parse_request(await reader.readuntil(b"\r\n\r\n"))
    except BadHead as error:
        raise Refused(error.status, str(error)) from None
    except asyncio.LimitOverrunError:
        raise Refused(431, f"the head is larger than {MAX_HEAD_BYTES} bytes") from None
    except TimeoutError:
        raise Refused(408, f"the head did not come within {HEAD_TIMEOUT_S:g} s") from None


@contextlib.asynccontextmanager
async def _opened(**how: Any) -> Any:
    """A connection's reader and writer. At the end what was written goes out, unless cancelled;
    that the other side broke it, or was silent for too long, is no error here."""
    reader, writer = await asyncio.open_connection(**how)
    try:
        # The connection's own failures only: what the caller has to know is `Refused`.
        with contextlib.suppress(OSError, EOFError, TimeoutError):
            yield reader, writer
        writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await writer.wait_closed()
    finally:
        writer.transport.abort()


@contextlib.asynccontextmanager
async def _connected(addresses: Sequence[str], wanted: HostPort) -> Any:
    """To the first address that answers. Raises `Refused`."""
    reason = OSError(errno.EADDRNOTAVAIL, "no address")
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            for address in addresses:
                try:
                    async with asyncio.timeout(CONNECT_TIMEOUT_S / 3):
                        connection = await _connect(address, wanted.port)
                except OSError as error:  # a TimeoutError is one
                    reason = error
                    continue
                break
            else:
                raise reason
    except TimeoutError:
        raise Refused(504, f"{wanted}: no connection in time") from None
    except OSError as error:
        raise Refused(502, f"{wanted}: no connection: {os.strerror(error.errno or 0)}") from None
    async with _opened(sock=connection, limit=MAX_HEAD_BYTES) as streams:
        yield streams


async def _connect(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.get_running_loop().sock_connect(connection, (address, port))
    except BaseException:
        connection.close()
        raise
    return connection


async def _copy(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, idle: asyncio.Timeout
) -> None:
    """All that comes, as fast as it is taken, and its end."""
    while chunk := await reader.read(COPY_BYTES):
        await _pass_on(chunk, writer, idle)
    writer.write_eof()


async def _pass_on(chunk: bytes, writer: asyncio.StreamWriter, idle: asyncio.Timeout) -> None:
    idle.reschedule(asyncio.get_running_loop().time() + IDLE_TIMEOUT_S)
    writer.write(chunk)
    await writer.drain()


async def _send_body(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, size: int, idle: asyncio.Timeout
) -> None:
    """The one body. Returns when the client goes, or says more than its one request."""
    while size > 0 and (chunk := await reader.read(min(size, COPY_BYTES))):
        size -= len(chunk)
        await _pass_on(chunk, writer, idle)
    await reader.read(1)


async def _send_answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, idle: asyncio.Timeout
) -> None:
    status = 100
    while status < 200:
        try:
            status, head = parse_answer(await reader.readuntil(b"\r\n\r\n"))
        except (BadHead, EOFError, asyncio.LimitOverrunError):
            raise Refused(502, "the server's answer is not HTTP/1.1") from None
        await _pass_on(head, writer, idle)
    await _copy(reader, writer, idle)


async def _until(end: str, *works: Coroutine[Any, Any, None]) -> None:
    """Until the `end` that `asyncio.wait` knows; raises the error of one that is done. The others
    are cancelled."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=end)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


async def _say(
    refusal: Refused, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Many clients show the first line alone, so it says all."""
    body = f"{shorten(str(refusal), MAX_LINE_CHARS)}".replace("\n", " ").encode() + b"\n"
    writer.write(
        b"HTTP/1.1 %d %s\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n"
        b"Connection: close\r\n\r\n%s" % (refusal.status, body.rstrip(), len(body), body)
    )
    async with asyncio.timeout(LINGER_S):
        await writer.drain()
        writer.write_eof()
        while await reader.read(COPY_BYTES):
            pass


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(connection, settle, ready)
    try:
        await ready
    finally:
        loop.remove_reader(connection)
