"""Zygotes in a bare interpreter, so that tests do not wait for SDKs to import."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sandbox import ChildReport, Limits, SandboxSpec, Zygote
from sandbox.layers import OUTER, PROBE
from sandbox.layers.environ import allowed
from sandbox.probe import Probe, probe

AGENTS = Path(__file__).parent / "agents"


@pytest.fixture(scope="session")
def bare_python() -> str:
    """The interpreter that the tests' environment was made from: no SDK in it."""
    return str(getattr(sys, "_base_executable", sys.executable))


@pytest.fixture(scope="session")
def probed() -> Probe:
    return probe({**PROBE, **OUTER})


class Lab:
    """A loop and a zygote that runs `acts:act`, for all tests of a module."""

    def __init__(self, folder: Path, probed: Probe, python: str, tier: str) -> None:
        self.outer = tier if tier in OUTER else ""
        self.tier = "namespaces" if tier == "bwrap" else tier
        """What children see; an outer tier shows what the one within does."""
        self.num_outer = 1 if tier == "bwrap" else 0
        """Processes between the one that was started and the keeper."""
        self.folder = folder
        self.probed = probed
        self.python = python
        self.runner = asyncio.Runner()
        self._zygote: Zygote | None = None
        self._numbers = itertools.count()

    def do(self, do: str, *, env: dict[str, str] | None = None, **data: Any) -> ChildReport:
        """Run one act in the shared zygote (a new one where a test has killed it)."""
        wall_s = data.pop("wall_s", 30.0)

        async def go() -> ChildReport:
            zygote = await self.zygote()
            return await zygote.run({"do": do, **data}, env=env, wall_s=wall_s)

        return self.runner.run(go())

    async def zygote(self) -> Zygote:
        if self._zygote is None or not self._zygote.is_alive:
            self._zygote = await self.start("acts:act", limits=Limits(output_bytes=2**20))
        return self._zygote

    async def start(self, target: str, **options: Any) -> Zygote:
        """A zygote of this tier; fields of the spec and arguments of `Zygote.start` by name."""
        names = ("limits", "port", "readable", "hidden", "cgroups")
        spec = {name: options.pop(name) for name in names if name in options}
        timeout_s = options.pop("timeout_s", 30.0)
        options.setdefault("python", self.python)
        options.setdefault("python_path", [str(AGENTS)])
        return await Zygote.start(
            SandboxSpec(tier=self.outer or self.tier, env=allowed(os.environ), **spec),
            self.probed,
            folder=self.folder / f"zygote-{next(self._numbers)}",
            target=target,
            timeout_s=timeout_s,
            **options,
        )

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    def close(self) -> None:
        if self._zygote is not None:
            self.runner.run(self._zygote.close())
        self.runner.close()


@pytest.fixture(scope="module", params=["process", "namespaces", "bwrap"])
def lab(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    probed: Probe,
    bare_python: str,
) -> Iterator[Lab]:
    if reason := probed.layers.get(request.param, ""):
        pytest.skip(f"the tier {request.param} is not to be had here: {reason}")
    lab = Lab(tmp_path_factory.mktemp("lab"), probed, bare_python, request.param)
    yield lab
    lab.close()


class Door:
    """A TCP port of 127.0.0.1 whose connections, from children of either tier, go to `handle`.

    `host` listens there in this machine's own network: served in the tier process, where children
    share that, and never reached in the tier namespaces, where each child brings its listener.
    """

    def __init__(
        self,
        tier: str,
        handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
    ) -> None:
        self._tier = tier
        self._handle = handle
        self._servers: list[asyncio.Server] = []
        self.host = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.host.setblocking(False)
        self.port: int = self.host.getsockname()[1]

    async def __aenter__(self) -> Door:
        if self._tier == "process":
            await self.on_listener(self.host.fileno())
        return self

    async def on_listener(self, fd: int) -> None:
        listener = socket.socket(fileno=os.dup(fd))
        self._servers.append(await asyncio.start_server(self._handle, sock=listener))

    async def __aexit__(self, *_: object) -> None:
        for server in self._servers:
            server.close()
            await server.wait_closed()
        if self._tier == "namespaces":
            with pytest.raises(BlockingIOError):  # nobody came here
                self.host.accept()
        self.host.close()


@pytest.fixture
def door() -> type[Door]:
    return Door


class Named:
    """A name of its own for a test's daemons, by which they are found wherever they are."""

    def __init__(self) -> None:
        self.name = f"d-{os.urandom(6).hex()}"

    def pids(self) -> list[int]:
        """Of the whole machine; zombies do not count."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                stat = (entry / "stat").read_text() if entry.name.isdigit() else ""
            except (FileNotFoundError, ProcessLookupError):
                continue
            head, _, tail = stat.rpartition(") ")
            if head.partition("(")[2] == self.name and tail[0] not in "ZX":
                found.append(int(entry.name))
        return found


@pytest.fixture
def daemons() -> Named:
    return Named()


@pytest.fixture
def below() -> Callable[..., list[psutil.Process]]:
    """The processes below a process, as this machine sees them; of one name, where given."""

    def find(pid: int, name: str = "") -> list[psutil.Process]:
        found = []
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if not name or process.name() == name:
                    found.append(process)
        return found

    return find


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A folder for agents' modules. In the tier namespaces root's zygotes are nobody: open to all,
    unlike pytest's own."""
    folder = tmp_path / "code"
    folder.mkdir()
    folder.chmod(0o755)
    return folder


@pytest.fixture
def eventually() -> Callable[..., None]:
    """Polls a condition until it holds; fails naming it after ten seconds."""

    def wait(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
            time.sleep(0.005)

    return wait
