"""Ways out through the egress proxy: real children, real servers, and what the proxy does not do.

Servers stand on this machine's loopback, so entries name it literally, and clients are told to use
the proxy for it (NO_PROXY says otherwise).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from sandbox import (
    BlockingSandbox,
    ChildReport,
    Ending,
    Sandbox,
    SandboxSpec,
    ZygoteFailed,
    egress_handle,
)
from sandbox import plan as plans
from sandbox.allowlist import Allowlist, HostPort
from sandbox.egress import Child, Egress, Refused
from sandbox.layers.environ import allowed

ENV = allowed(os.environ)
ROOT = Path(__file__).parents[2]

CLIENT = """
import json, socket

def act(data):
    return globals()[data["do"]](data)

def connect(data):
    client = socket.create_connection(("127.0.0.1", 3128), timeout=data.get("timeout", 20))
    return client

def everything(client):
    said = b""
    try:
        while chunk := client.recv(65536):
            said += chunk
    except ConnectionResetError:
        said += b"[reset]"
    return said.decode("latin-1")

def say(data):
    'Everything that the proxy answers to these bytes.'
    with connect(data) as client:
        client.sendall(data["text"].encode("latin-1"))
        return everything(client)

def hold_open(data):
    import time
    time.sleep(600)

def ask_all(data):
    return [say({**data, "text": text}) for text in data["texts"]]
"""


COMPLETION = {
    "id": "c",
    "object": "chat.completion",
    "created": 0,
    "model": "m",
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "through the proxy"},
        }
    ],
}


class Server:
    """HTTP on this machine's loopback; remembers each request as it came."""

    def __init__(self, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> None:
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                server.seen.append((self.command, self.path, headers, body))
                answer = server.answer(self.path, body)
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer((host, 0), Handler)
        self._server.daemon_threads = True
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def answer(self, path: str, body: bytes) -> bytes:
        if path.endswith("/chat/completions"):
            return json.dumps(COMPLETION).encode()
        return b'{"path": "%s", "size": %d}' % (path.encode(), len(body))

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture
def client(code: Path) -> Path:
    (code / "client.py").write_text(CLIENT)
    return code


def spec_for(*allow: str, **more: Any) -> SandboxSpec:
    return SandboxSpec(tier="namespaces", env=ENV, allow=allow, **more)


def box_for(client: Path, python: str, *allow: str, **more: Any) -> BlockingSandbox:
    return BlockingSandbox(
        spec_for(*allow, **more), target="client:act", python=python, python_path=[str(client)]
    )


def test_both_ways_of_http_lead_to_what_is_listed(
    server: Server, client: Path, bare_python: str
) -> None:
    at = f"127.0.0.1:{server.port}"
    plain = (
        f"POST http://{at}/a?b HTTP/1.1\r\nHost: elsewhere.example\r\nContent-Length: 2\r\n"
        "Proxy-Authorization: x\r\n\r\nhi"
    )
    tunnel = (
        f"CONNECT {at} HTTP/1.1\r\nHost: {at}\r\n\r\n"
        f"GET /t HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\n\r\n"
    )
    with box_for(client, bare_python, at) as box:
        report = box.run({"do": "ask_all", "texts": [plain, tunnel]})
    assert report.ending is Ending.RETURNED, report
    posted, tunnelled = report.value
    assert posted.startswith("HTTP/1.1 200 OK\r\n")
    assert '"path": "/a?b", "size": 2' in posted
    assert "\r\nConnection: close\r\n" in posted
    assert tunnelled.startswith("HTTP/1.1 200 Connection established\r\n\r\nHTTP/1.1 200 OK")
    assert '"path": "/t"' in tunnelled
    (_, _, headers, body), _ = server.seen
    assert headers == {"host": at, "content-length": "2", "connection": "close"}
    assert body == b"hi"
    assert report.egress_refused == {}


def test_what_is_not_listed_is_refused_by_name_and_counted(
    server: Server, client: Path, bare_python: str
) -> None:
    at = f"127.0.0.1:{server.port}"
    wanted = {
        f"127.0.0.1:{server.port + 1}": 1,
        f"localhost:{server.port}": 1,  # a name is not the address that it has
        "other.example:443": 2,
        "169.254.169.254:80": 1,
    }
    texts = [
        f"CONNECT {name} HTTP/1.1\r\n\r\n" for name, count in wanted.items() for _ in range(count)
    ]
    with box_for(client, bare_python, at) as box:
        report = box.run({"do": "ask_all", "texts": [*texts, "GET / HTTP/1.1\r\n\r\n"]})
        again = box.run({"do": "say", "text": "GET http://a.example/ HTTP/1.1\r\n\r\n"})
    assert report.ending is Ending.RETURNED, report
    *refusals, malformed = report.value
    for name, said in zip([t.split()[1] for t in texts], refusals, strict=True):
        first = f"{name} is not allowed: see sandbox.network.allow"
        assert said.startswith(f"HTTP/1.1 403 {first}\r\n")
        assert said.endswith(f"\r\n\r\n{first}\n")
    assert malformed.startswith("HTTP/1.1 400 this is a proxy")
    assert report.egress_refused == wanted
    assert again.egress_refused == {"a.example:80": 1}, "of each child alone"
    assert server.seen == []


def test_a_listed_name_never_leads_to_an_address_inside(
    server: Server, client: Path, bare_python: str
) -> None:
    name, address = f"localhost:{server.port}", f"127.0.0.1:{server.port}"
    text = f"GET http://{name}/ HTTP/1.1\r\n\r\n"
    with box_for(client, bare_python, name) as box:
        report = box.run({"do": "say", "text": text})
    assert f"403 {name} is at " in report.value
    assert "which is not public" in report.value
    assert report.egress_refused == {name: 1}
    assert server.seen == []
    with box_for(client, bare_python, name, address, f"[::1]:{server.port}") as box:
        said = box.run({"do": "say", "text": text}).value
    assert '"path": "/"' in said, "unless that address is listed, too"


def test_a_name_that_is_not_there_and_a_port_where_nobody_is(
    client: Path, bare_python: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        at = f"127.0.0.1:{closed.getsockname()[1]}"
    texts = [f"CONNECT {name} HTTP/1.1\r\n\r\n" for name in ("a.invalid:443", at)]
    with box_for(client, bare_python, "a.invalid:443", at) as box:
        report = box.run({"do": "ask_all", "texts": texts})
    unknown, refused = report.value
    assert unknown.startswith("HTTP/1.1 502 a.invalid:443: its name cannot be resolved")
    assert refused.startswith(f"HTTP/1.1 502 {at}: no connection: Connection refused")
    assert report.egress_refused == {}


def test_a_server_that_resets_at_once_is_answered_for() -> None:
    """Not with a traceback in the supervisor's log, as often as a child wants one."""

    async def go() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            server, _ = listener.accept()
            reset_at_close = struct.pack("ii", 1, 0)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset_at_close)
            server.close()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        _, writer = await asyncio.open_connection(sock=client)
        child = Child(Egress(Allowlist([]), num_connections=1), client)
        with pytest.raises(Refused, match="no connection: Connection reset") as refused:
            child._check_peer(writer, HostPort("a.example", 443))
        assert refused.value.status == 502
        writer.close()

    asyncio.run(go())


def test_one_request_per_connection(server: Server, client: Path, bare_python: str) -> None:
    at = f"127.0.0.1:{server.port}"
    smuggled = f"GET http://{at}/two HTTP/1.1\r\nHost: {at}\r\n\r\n"
    post = f"POST http://{at}/one HTTP/1.1\r\n"
    texts = [
        f"GET http://{at}/one HTTP/1.1\r\n\r\n{smuggled}",
        f"{post}Content-Length: 1\r\n\r\nx{smuggled}",
        f"{post}Content-Length: 0\r\nContent-Length: 9\r\n\r\n{smuggled}",
        f"{post}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n{smuggled}",
    ]
    with box_for(client, bare_python, at) as box:
        report = box.run({"do": "ask_all", "texts": texts})
    assert report.ending is Ending.RETURNED, report
    assert all(path == "/one" for _, path, _, _ in server.seen)
    assert report.value[2].startswith("HTTP/1.1 400")
    assert report.value[3].startswith("HTTP/1.1 411")


def test_connections_are_cut_when_the_child_ends(client: Path, bare_python: str) -> None:
    (client / "client.py").write_text(
        CLIENT
        + """
def hold(data):
    client = connect(data)
    client.sendall(f"CONNECT {data['at']} HTTP/1.1\\r\\n\\r\\nheld".encode())
    assert b" 200 " in client.recv(100)
    client.recv(1)
"""
    )

    async def go() -> tuple[bytes, ChildReport]:
        ended: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert await reader.readexactly(4) == b"held"
            running.cancel()
            rest = b""
            with contextlib.suppress(ConnectionResetError):
                rest = await reader.read()
            ended.set_result(rest)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        at = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with (
            server,
            Sandbox(
                spec_for(at), target="client:act", python=bare_python, python_path=[str(client)]
            ) as box,
        ):
            running = asyncio.ensure_future(box.run({"do": "hold", "at": at}, wall_s=60))
            with pytest.raises(asyncio.CancelledError):
                await running
            async with asyncio.timeout(10):
                rest = await ended
            return rest, await box.run({"do": "ask_all", "texts": []})

    rest, after = asyncio.run(go())
    assert rest == b""
    assert (after.ending, after.value) == (Ending.RETURNED, [])


def test_a_slow_reader_slows_the_writer_and_a_half_closed_tunnel_goes_on(
    client: Path, bare_python: str
) -> None:
    size = 64 * 2**20
    (client / "client.py").write_text(
        CLIENT
        + """
def upload(data):
    with connect(data) as client:
        client.sendall(f"CONNECT {data['at']} HTTP/1.1\\r\\n\\r\\n".encode())
        assert b" 200 " in client.recv(100)
        block = b"x" * 2**20
        for _ in range(data["size"] // len(block)):
            client.sendall(block)
        client.shutdown(socket.SHUT_WR)
        return everything(client)
"""
    )

    async def go() -> tuple[ChildReport, int]:
        most = 0

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal most
            num_bytes = 0
            (proxy,) = [
                child
                for child in psutil.Process().children()
                if child.pid in box.zygote.pids - {box.zygote.guardian_pid}
            ]
            while chunk := await reader.read(2**16):
                if num_bytes >> 22 != (num_bytes + len(chunk)) >> 22:
                    most = max(most, proxy.memory_info().rss)
                num_bytes += len(chunk)
            writer.write(str(num_bytes).encode())
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        at = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with (
            server,
            Sandbox(
                spec_for(at), target="client:act", python=bare_python, python_path=[str(client)]
            ) as box,
        ):
            return await box.run({"do": "upload", "at": at, "size": size}, wall_s=60), most

    report, most = asyncio.run(go())
    assert report.value == str(size), report
    assert 0 < most < size, "it holds a little of it at a time"


def test_the_proxy_is_sealed_has_no_environment_and_ends_with_the_zygote(
    client: Path, bare_python: str
) -> None:
    with box_for(client, bare_python, "a.example:443") as box:
        (pid,) = box.zygote.pids - {box.zygote.guardian_pid}
        proxy = psutil.Process(pid)
        status = (Path("/proc") / str(pid) / "status").read_text()
        assert "NoNewPrivs:\t1" in status
        assert "Seccomp:\t2" in status
        assert "CapEff:\t0000000000000000" in status
        assert proxy.environ() == {}
        assert proxy.children() == []
    assert not psutil.pid_exists(pid)

    with box_for(client, bare_python, "a.example:443") as box:
        zygote = box.zygote
        (pid,) = zygote.pids - {zygote.guardian_pid}
        os.kill(pid, signal.SIGKILL)
        report = box.run({"do": "hold_open"}, wall_s=60)
        assert report.ending is Ending.LOST, "no child goes on without the way out it was promised"
        assert not zygote.is_alive


def test_a_proxy_that_hangs_is_given_up_with_its_zygote(
    client: Path, bare_python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(egress_handle, "END_TIMEOUT_S", 0.3)
    with box_for(client, bare_python, "a.example:443") as box:
        (pid,) = box.zygote.pids - {box.zygote.guardian_pid}
        os.kill(pid, signal.SIGSTOP)
        report = box.run({"do": "ask_all", "texts": []})
        assert (report.ending, report.egress_refused) == (Ending.RETURNED, {})
        assert box.run({"do": "hold_open"}, wall_s=60).ending is Ending.LOST
    assert not psutil.pid_exists(pid)


def test_it_ends_with_a_caller_that_is_killed(
    client: Path, bare_python: str, eventually: Callable[..., None]
) -> None:
    code = (
        "import sys, time\nfrom sandbox import BlockingSandbox, SandboxSpec\n"
        "spec = SandboxSpec(tier='namespaces', allow=['a.example:443'])\n"
        "with BlockingSandbox(spec, python=sys.argv[1]) as box:\n"
        "    print(*box.zygote.pids, flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, bare_python], stdout=subprocess.PIPE, cwd=ROOT, text=True
    ) as caller:
        assert caller.stdout is not None
        pids = [int(word) for word in caller.stdout.readline().split()]
        assert len(pids) == 2
        caller.kill()
    eventually(lambda: not any(map(psutil.pid_exists, pids)), "both end")


def test_a_proxy_that_cannot_be_sealed_is_not_used(
    client: Path, bare_python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = plans.to_json

    def broken(plan: plans.Plan) -> dict[str, Any]:
        return {**made(plan), "egress": [{"layer": "rlimits", "args": {"RLIMIT_NONE": [1, 1]}}]}

    monkeypatch.setattr(egress_handle.plans, "to_json", broken)
    with (
        pytest.raises(ZygoteFailed, match=r"egress proxy did not start: .*'rlimits' failed"),
        box_for(client, bare_python, "a.example:443"),
    ):
        pass


def test_the_caller_gets_its_own_listener_beside_it(
    server: Server, client: Path, bare_python: str
) -> None:
    (client / "client.py").write_text(
        CLIENT
        + """
def both(data):
    with socket.create_connection(("127.0.0.1", 8080), timeout=20) as own:
        return [own.recv(100).decode(), say(data)]
"""
    )
    at = f"127.0.0.1:{server.port}"

    async def go() -> ChildReport:
        servers = []

        async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"the caller's")
            writer.close()

        async def on_listener(fd: int) -> None:
            listener = socket.socket(fileno=os.dup(fd))
            servers.append(await asyncio.start_server(greet, sock=listener))

        async with Sandbox(
            spec_for(at, port=8080),
            target="client:act",
            python=bare_python,
            python_path=[str(client)],
            reserve=1,
        ) as box:
            text = f"GET http://{at}/ HTTP/1.1\r\n\r\n"
            report = await box.zygote.run({"do": "both", "text": text}, on_listener=on_listener)
            for each in servers:
                each.close()
            return report

    own, through = asyncio.run(go()).value
    assert own == "the caller's"
    assert '"path": "/"' in through


def certificate(folder: Path) -> tuple[Path, Path]:
    key, cert = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=test", "-keyout", str(key), "-out", str(cert)),
            *("-addext", "subjectAltName=IP:127.0.0.2"),
        ],
        check=True,
        capture_output=True,
    )
    cert.chmod(0o644)
    return key, cert


CLIENTS = """
import asyncio, os, subprocess, urllib.error, urllib.request

def act(data):
    import openai

    def complete(base_url):
        with openai.OpenAI(base_url=base_url, api_key="k", max_retries=0, timeout=20) as client:
            message = {"role": "user", "content": "hi"}
            answer = client.chat.completions.create(model="m", messages=[message])
            return answer.choices[0].message.content

    async def complete_later(base_url):
        options = {"base_url": base_url, "api_key": "k", "max_retries": 0, "timeout": 20}
        async with openai.AsyncOpenAI(**options) as client:
            message = {"role": "user", "content": "hi"}
            answer = await client.chat.completions.create(model="m", messages=[message])
            return answer.choices[0].message.content

    def refused(url):
        try:
            urllib.request.urlopen(url, timeout=20)
        except urllib.error.HTTPError as error:
            return error.reason
        except urllib.error.URLError as error:
            return str(error.reason)

    def curl(*words):
        return subprocess.run(["curl", "-sS", *words], capture_output=True, text=True).stdout

    return {
        "openai": complete(data["tls"] + "/v1"),
        "async openai": asyncio.run(complete_later(data["tls"] + "/v1")),
        "its own model": complete("http://127.0.0.1:8080/v1"),
        "urllib": urllib.request.urlopen(data["plain"] + "/u", timeout=20).read().decode(),
        "urllib, TLS": urllib.request.urlopen(data["tls"] + "/u", timeout=20).read().decode(),
        "refused": [refused("http://evil.example/x"), refused("https://evil.example/x")],
        "curl": curl(data["plain"] + "/c") if data["curl"] else None,
        "curl, TLS": curl("--cacert", os.environ["SSL_CERT_FILE"], data["tls"] + "/c")
        if data["curl"] else None,
    }
"""


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_real_clients_find_their_way_out_and_the_model_stays_theirs(
    code: Path, tmp_path: Path
) -> None:
    """At an address of this machine that NO_PROXY does not name."""
    key, cert = certificate(code)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(cert, key)
    (code / "clients.py").write_text(CLIENTS)
    with contextlib.ExitStack() as stack:
        servers = [Server("127.0.0.2"), Server("127.0.0.2", tls), Server()]
        for each in servers:
            stack.callback(each.close)
        plain, secure, model = servers

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            to = await asyncio.open_connection("127.0.0.1", model.port)
            copies = [(reader, to[1]), (to[0], writer)]
            await asyncio.gather(*(copy(*ends) for ends in copies))

        async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError):
                while chunk := await reader.read(2**16):
                    writer.write(chunk)
            writer.close()

        async def on_listener(fd: int) -> None:
            listener = socket.socket(fileno=os.dup(fd))
            relays.append(await asyncio.start_server(relay, sock=listener))

        relays: list[asyncio.Server] = []

        async def go() -> ChildReport:
            spec = spec_for(*(f"127.0.0.2:{each.port}" for each in (plain, secure)), port=8080)
            async with Sandbox(
                spec, target="clients:act", python=sys.executable, python_path=[str(code)]
            ) as box:
                data = {
                    "plain": f"http://127.0.0.2:{plain.port}",
                    "tls": f"https://127.0.0.2:{secure.port}",
                    "curl": shutil.which("curl") is not None,
                }
                report = await box.zygote.run(
                    data, env={"SSL_CERT_FILE": str(cert)}, on_listener=on_listener, wall_s=60
                )
                for each in relays:
                    each.close()
                return report

        report = asyncio.run(go())
    assert report.ending is Ending.RETURNED, report.traceback
    said = report.value
    assert said["openai"] == said["async openai"] == "through the proxy"
    assert said["its own model"] == "through the proxy"
    assert [path for _, path, _, _ in model.seen] == ["/v1/chat/completions"]
    assert said["urllib"] == said["urllib, TLS"] == '{"path": "/u", "size": 0}'
    refusal = "is not allowed: see sandbox.network.allow"
    assert said["refused"] == [
        f"evil.example:80 {refusal}",
        f"Tunnel connection failed: 403 evil.example:443 {refusal}",
    ]
    if said["curl"] is not None:
        assert said["curl"] == said["curl, TLS"] == '{"path": "/c", "size": 0}'
    assert report.egress_refused == {"evil.example:80": 1, "evil.example:443": 1}


def test_the_command_line_alone(bare_python: str) -> None:
    script = (
        "import sys, urllib.request\n"
        "for url in sys.argv[1:]:\n"
        "    try: print(urllib.request.urlopen(url).read().decode())\n"
        "    except OSError as error: print(error)\n"
    )
    with contextlib.closing(Server("127.0.0.2")) as server:
        at = f"127.0.0.2:{server.port}"
        words = [sys.executable, "-m", "sandbox", "run", "--net", f"allow:{at},a.example:443"]
        urls = [f"http://{at}/", "http://b.example/"]
        done = subprocess.run(
            [*words, "--", bare_python, "-I", "-c", script, *urls],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=60,
            check=False,
        )
    assert '"path": "/"' in done.stdout
    assert "403" in done.stdout
    assert "sandbox: refused b.example:80 (1x): see --net" in done.stderr
    shown = subprocess.run(
        [*words, "--plan"], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    assert f"allow   {at}\nallow   a.example:443" in shown.stdout
    wrong = subprocess.run(
        [sys.executable, "-m", "sandbox", "run", "--net", "allow:a.example", "--", "true"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    assert wrong.returncode == 125
    assert "'a.example': write host:port" in wrong.stderr
