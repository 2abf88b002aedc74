"""Attacks on the egress proxy (rows 47d to 47f). See `attacks`."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from typing import Any

from calls import Attempt, Refused, attempt

PROXY = ("127.0.0.1", 3128)
TIMEOUT_S = 15.0
NUM_CONNECTIONS = 1000
NUM_PROCESSES = 5


def _say(text: str) -> str:
    """The head of what the proxy answers, or what there is of one."""
    said = b""
    with socket.create_connection(PROXY, timeout=TIMEOUT_S) as client:
        client.sendall(text.encode("latin-1"))
        with contextlib.suppress(ConnectionResetError):
            while b"\r\n\r\n" not in said and (chunk := client.recv(2**16)):
                said += chunk
    return said.decode("latin-1")


def ask_listed(data: dict[str, Any]) -> float:
    """How long an honest request takes, in seconds."""
    started = time.monotonic()
    said = _say(f"GET http://127.0.0.1:{data['listed']}/honest HTTP/1.1\r\n\r\n")
    assert said.startswith("HTTP/1.1 200"), said
    return time.monotonic() - started


def a47d(data: dict[str, Any]) -> str:
    """Hosts, ports and addresses that are not listed, in every spelling."""
    listed, inside = data["listed"], data["inside"]
    targets = [
        *(f"127.0.0.1:{inside}", f"127.0.0.1:{data['tcp']}", f"127.0.0.2:{listed}"),
        # Its name is listed, its address is not.
        *(f"localhost:{inside}", f"LOCALHOST.:{inside}"),
        *("169.254.169.254:80", "metadata.google.internal:80", "[fd00:ec2::254]:80"),
        *(f"[::ffff:127.0.0.1]:{inside}", f"[::1]:{inside}", f"[::]:{inside}"),
        *(f"127.1:{inside}", f"0x7f000001:{inside}", f"2130706433:{inside}", f"0:{inside}"),
        *(f"0.0.0.0:{inside}", f"127.0.0.1.:{inside}", f"127.0.0.01:{inside}"),
        *(f"127.0.0.1:{listed}@127.0.0.1:{inside}", f"127.0.0.1:{inside}#:{listed}"),
        *(f"127.0.0.1:0{inside + 2**16}", f"127.0.0.1:{inside}%00:{listed}"),
        *("evil.example:443", "x.localhost:80", f"localhost\x00.example:{inside}"),
    ]

    def reach(text: str) -> str:
        said = _say(text)
        if said.startswith(("HTTP/1.1 403", "HTTP/1.1 400")):
            raise Refused(said[9:12])
        return said

    attempts: list[Attempt] = []
    for target in targets:
        connect = f"CONNECT {target} HTTP/1.1\r\n\r\n"
        get = f"GET http://{target}/inside HTTP/1.1\r\nHost: 127.0.0.1:{listed}\r\n\r\n"
        attempts.append((f"CONNECT {target!r}", lambda text=connect: reach(text)))
        attempts.append((f"GET {target!r}", lambda text=get: reach(text)))
    return attempt(*attempts)


def a47e(data: dict[str, Any]) -> str:
    """Requests that two readers could take for different ones; judged by what arrives."""
    at = f"127.0.0.1:{data['listed']}"
    other = f"localhost:{data['inside']}"
    hidden = f"GET /hidden HTTP/1.1\r\nHost: {other}\r\n\r\n"
    heads = [
        f"GET http://{at}/plain HTTP/1.1\r\nHost: {other}",
        f"GET http://{at}/plain HTTP/1.1\r\nHost: {other}\r\nHost: {at}\r\nConnection: Host",
        f"GET http://{at}/plain HTTP/1.1\r\nX: a\nHost: {other}",
        f"GET http://{at}/plain HTTP/1.1\r\nX: a\rHost: {other}",
        f"GET http://{at}/plain HTTP/1.1\r\n Host: {other}",
        f"GET http://{at}/plain HTTP/1.1\r\nHost : {other}",
        f"GET http://{at}/plain HTTP/1.1 x\r\nHost: {other}",
        f"POST http://{at}/plain HTTP/1.1\r\nContent-Length: 0",
        f"POST http://{at}/plain HTTP/1.1\r\nContent-Length: 0\r\nConnection: Content-Length",
        f"POST http://{at}/plain HTTP/1.1\r\nContent-Length: 0\r\nContent-Length: 70",
        f"POST http://{at}/plain HTTP/1.1\r\nContent-Length: 0, 70",
        f"POST http://{at}/plain HTTP/1.1\r\nContent-Length: +0",
        f"POST http://{at}/plain HTTP/1.1\r\nTransfer-Encoding: chunked",
        f"POST http://{at}/plain HTTP/1.1\r\nTransfer-Encoding : chunked",
        f"POST http://{at}/plain HTTP/1.1\r\nTransfer-Encoding: xchunked\r\nContent-Length: 0",
        f"GET http://{at}/plain HTTP/1.1\r\nUpgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings",
    ]
    for head in heads:
        _say(f"{head}\r\n\r\n{hidden}")
        _say(f"{head}\r\n\r\n0\r\n\r\n{hidden}")
    return "left"


def a47f(data: dict[str, Any]) -> str:
    """Heads that are slow or endless, and more connections than anybody needs."""
    at = f"127.0.0.1:{data['listed']}"
    with socket.create_connection(PROXY, timeout=60) as tunnel:
        tunnel.sendall(f"CONNECT {at} HTTP/1.1\r\n\r\n".encode())
        assert b" 200 " in tunnel.recv(1000)
        with socket.create_connection(PROXY, timeout=TIMEOUT_S) as client:
            with contextlib.suppress(OSError):
                client.sendall(f"GET http://{at}/ HTTP/1.1\r\nX: ".encode())
                for _ in range(200):
                    client.sendall(b"x" * 2**20)
        reader, writer = os.pipe()
        for _ in range(NUM_PROCESSES):
            if os.fork() == 0:
                try:
                    _hold(NUM_CONNECTIONS // NUM_PROCESSES, writer)
                finally:
                    os._exit(1)
        for _ in range(NUM_PROCESSES):
            assert os.read(reader, 1)
        tunnel.sendall(b"GET /up HTTP/1.1\r\n\r\n")
        return "left" if tunnel.recv(1000) else "the tunnel ended"


def _hold(number: int, ready: int) -> None:
    held = []
    for _ in range(number):
        client = socket.socket()
        client.setblocking(False)
        client.connect_ex(PROXY)
        held.append(client)
    time.sleep(0.5)  # for the handshakes
    for client in held:
        with contextlib.suppress(OSError):
            client.send(b"GET http://evil.example/ HTTP/1.1\r\nX: ")
    os.write(ready, b"x")
    time.sleep(600)
