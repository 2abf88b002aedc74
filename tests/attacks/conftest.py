"""The stage for attacks: zygotes of each tier, and the world outside that hostile code aims at.

The world is real: a home with keys, a process of the same user, listeners on TCP, UDP, abstract and
pathname sockets, a project with a hidden folder, and a sibling that has to notice nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import areal_sub
from areal_sub.workflow import GRADER_TARGET, GRADER_VARIABLE
from sandbox import ChildReport, Ending, Limits, SandboxSpec, Zygote
from sandbox.layers import OUTER, PROBE
from sandbox.layers.environ import allowed
from sandbox.probe import Probe, probe

HERE = Path(__file__).parent
sys.path.append(str(HERE))  # for `catalog`, which `write_table.py` reads, too

from house import House  # noqa: E402

TIERS = ("namespaces", "process", "bwrap")
SECRETS = ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY")
MIB = 2**20
LIMITS = {
    "wall_s": 20.0,
    "cpu_s": 10,
    "memory_bytes": 512 * MIB,
    "open_files": 256,
    "file_bytes": 8 * MIB,
    "output_bytes": MIB // 4,
    "result_bytes": MIB // 16,
    "total_memory_bytes": 512 * MIB,
    "total_cpu_s": 10,
    "processes": 64,
    "scratch_bytes": 16 * MIB,
    "scratch_files": 2000,
    "outputs_bytes": 12 * MIB,
    "outputs_files": 1000,
}


def make_canary(of: str) -> str:
    """A secret that can be recognised wherever it turns up."""
    return f"CANARY-{of}-{secrets.token_hex(8)}"


class World:
    """What lies outside. `aims` (JSON) tells hostile code where; it holds no canary itself."""

    def __init__(self, folder: Path) -> None:
        self._closing = contextlib.ExitStack()
        self.made_at = time.time()
        folder.chmod(0o755)
        self.home = folder / "home"
        self.project = folder / "project"
        (self.home / ".aws").mkdir(parents=True)
        (self.project / "hidden").mkdir(parents=True)
        self.canary_file = self.home / ".aws" / "credentials"
        self.hidden_file = self.project / "hidden" / "answers"
        self.readme = self.project / "README"
        self.hidden_by_name = self.project / ".env"
        self.hidden_by_link = self.project / "linked" / "answers"
        self.hidden_by_link.parent.mkdir()
        for file in (
            self.canary_file,
            self.hidden_file,
            self.hidden_by_name,
            self.hidden_by_link,
        ):
            file.write_text(make_canary("file"))
        # In a folder that root's zygotes, who are nobody, cannot enter.
        (folder / "locked").mkdir(0o700)
        self.link_to_hidden = folder / "locked" / "link"
        self.link_to_hidden.symlink_to(self.hidden_by_link.parent)
        self.readme.write_text("anybody may read this")
        (self.project / "link").symlink_to(self.canary_file)
        self.environment = {name: make_canary("env") for name in SECRETS}
        with self._environment_of_the_trainer():
            self.victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        self._closing.callback(self._end_victim)
        name = f"attack-{secrets.token_hex(8)}"
        self.tcp = self._listener(socket.AF_INET, ("127.0.0.1", 0))
        self.out = self._listener(socket.AF_INET, ("127.0.0.1", 0))
        port = self.out.getsockname()[1]
        self._listener(socket.AF_INET, ("127.0.0.2", port))
        self.udp = self._bound(socket.AF_INET, ("127.0.0.1", 0))
        self._listener(socket.AF_UNIX, f"\0{name}")
        self._bound(socket.AF_UNIX, f"\0{name}-datagram")
        self._listener(socket.AF_UNIX, f"\0{name}-packets", socket.SOCK_SEQPACKET)
        # Relative, since paths of Unix sockets are short.
        with contextlib.chdir(folder):
            self._listener(socket.AF_UNIX, "home/s")
            self._bound(socket.AF_UNIX, "home/s-datagram")
            self._listener(socket.AF_UNIX, "home/s-packets", socket.SOCK_SEQPACKET)
            self._listener(socket.AF_UNIX, "project/s")
        for path in ("home/s", "home/s-datagram", "home/s-packets", "project/s"):
            (folder / path).chmod(0o777)
        self.aims: dict[str, Any] = {
            "home": str(self.home),
            "canary": str(self.canary_file),
            "project": str(self.project),
            "readme": str(self.readme),
            "hidden": str(self.hidden_file),
            "hidden_by_name": str(self.hidden_by_name),
            "hidden_by_link": str(self.hidden_by_link),
            "link": str(self.project / "link"),
            "victim": self.victim.pid,
            "tcp": self.tcp.getsockname()[1],
            "udp": self.udp.getsockname()[1],
            "port": port,
            "abstract": name,
            "home_socket": str(self.home / "s"),
            "project_socket": str(self.project / "s"),
        }

    @contextlib.contextmanager
    def _environment_of_the_trainer(self) -> Iterator[None]:
        before = dict(os.environ)
        os.environ.update(self.environment, HOME=str(self.home))
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    def as_trainer(self) -> contextlib.AbstractContextManager[None]:
        """While it lasts, this process is one with secrets in its environment and its HOME."""
        return self._environment_of_the_trainer()

    def is_intact(self) -> bool:
        return (
            self.victim.poll() is None
            and self.canary_file.read_text().startswith("CANARY")
            and self.readme.read_text() == "anybody may read this"
            and sorted(path.name for path in self.project.iterdir())
            == [".env", "README", "hidden", "link", "linked", "s"]
        )

    def _bound(self, family: int, address: Any, kind: int = socket.SOCK_DGRAM) -> socket.socket:
        opened = self._closing.enter_context(socket.socket(family, kind))
        opened.bind(address)
        opened.setblocking(False)
        return opened

    def _listener(self, family: int, address: Any, kind: int = socket.SOCK_STREAM) -> socket.socket:
        listener = self._bound(family, address, kind)
        listener.listen(64)
        return listener

    def _end_victim(self) -> None:
        self.victim.kill()
        self.victim.wait()

    def close(self) -> None:
        self._closing.close()


class Sibling:
    """A child that waits while another one attacks, and then shows whether it still works."""

    def __init__(self) -> None:
        self.up = asyncio.Event()
        self._go = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.up.set()
        await self._go.wait()
        writer.write(b"x")
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.close()

    def release(self) -> None:
        self._go.set()


class Stage:
    """Zygotes of one tier in one world, and a loop to run them on."""

    def __init__(self, tier: str, folder: Path, probed: Probe, python: str) -> None:
        self.tier = tier
        self.world = World(folder)
        self.canary = make_canary
        # Open to all: in the tier namespaces root's zygotes are nobody.
        self.code = folder / "code"
        no_caches = shutil.ignore_patterns("__pycache__")
        shutil.copytree(HERE / "agents", self.code, ignore=no_caches)
        package = Path(areal_sub.__file__).parent  # what the children of graders run
        shutil.copytree(package / "workflow", self.code / "areal_sub/workflow", ignore=no_caches)
        for name in ("__init__.py", "errors.py"):
            shutil.copy(package / name, self.code / "areal_sub" / name)
        self.folder = folder
        self._probed = probed
        self.has_groups = not probed.layers["cgroups"]
        self._python = python
        self._runner = asyncio.Runner()
        self._zygotes: dict[str, Zygote] = {}
        self._num_zygotes = 0
        self._cleanup = contextlib.AsyncExitStack()
        self._house: House | None = None
        loop = self._runner.get_loop()
        loop.add_reader(self.world.udp, self._echo)

    def run(self, work: Any) -> Any:
        return self._runner.run(work)

    async def start(self, target: str = "attacks:act", **limits: Any) -> Zygote:
        self._num_zygotes += 1
        allow = limits.pop("allow", ())
        start = limits.pop("start", "fork")
        grader = limits.pop("grader", "")  # as the supervisor starts one
        port = limits.pop("port", self.world.aims["port"])
        named = {GRADER_VARIABLE: grader} if grader else {}
        spec = SandboxSpec(
            tier=self.tier,
            env={**allowed(os.environ), **named},
            limits=Limits(**{**LIMITS, **limits}),
            readable=(str(self.world.project),),
            hidden=(
                str(self.world.hidden_file.parent),
                str(self.world.hidden_by_name),
                str(self.world.link_to_hidden),
            ),
            port=None if grader else port,
            allow=allow,
        )
        with self.world.as_trainer():
            return await Zygote.start(
                spec,
                self._probed,
                folder=self.folder / f"zygote-{self._num_zygotes}",
                target=GRADER_TARGET if grader else target,
                python=self._python,
                python_path=[str(self.code)],
                start=start,
                timeout_s=30.0,
            )

    async def zygote(self, target: str = "attacks:act", **limits: Any) -> Zygote:
        """Shared by all attacks with these limits; a new one only where an attack has ended it."""
        key = json.dumps([target, limits], sort_keys=True)
        if key not in self._zygotes or not self._zygotes[key].is_alive:
            self._zygotes[key] = await self.start(target, **limits)
        return self._zygotes[key]

    async def attack(self, zygote: Zygote, attack: str, /, **more: Any) -> ChildReport:
        """Run one attack."""
        env = more.pop("env", {})
        wall_s = more.pop("wall_s", None)
        outputs = more.pop("outputs", ())
        on_listener = more.pop("on_listener", None)
        data = {**self.world.aims, "guardian": zygote.guardian_pid, "attack": attack, **more}
        return await zygote.run(
            data, env=env, wall_s=wall_s, outputs=outputs, on_listener=on_listener
        )

    async def house(self) -> House:
        """The proxy that is attacked, with its engine and rollouts. One for all attacks."""
        if self._house is None:
            self._house = await self._cleanup.enter_async_context(
                House.serving(self.folder / "house")
            )
        return self._house

    @contextlib.asynccontextmanager
    async def beside_a_sibling(self, zygote: Zygote) -> AsyncIterator[None]:
        """A sibling stands beside what happens here, and the zygote serves on afterwards."""
        sibling = Sibling()
        servers = []

        async def on_listener(fd: int) -> None:
            listener = socket.socket(fileno=os.dup(fd))
            servers.append(await asyncio.start_server(sibling.serve, sock=listener))

        if self.tier == "process":
            await on_listener(self.world.out.fileno())
        data = {**self.world.aims, "attack": "undisturbed"}
        waiting = asyncio.ensure_future(zygote.run(data, on_listener=on_listener, wall_s=100.0))
        up = asyncio.ensure_future(sibling.up.wait())
        try:
            await asyncio.wait({waiting, up}, timeout=20, return_when=asyncio.FIRST_COMPLETED)
            assert sibling.up.is_set(), waiting
            yield
        finally:
            up.cancel()
            sibling.release()
            report = await waiting
            for server in servers:
                server.close()
                await server.wait_closed()
        assert (report.ending, report.value) == (Ending.RETURNED, "undisturbed"), report
        assert zygote.is_alive
        again = await zygote.run({"attack": "undisturbed_alone"}, wall_s=20.0)
        assert again.value == "well", again

    def children_folders(self) -> list[str]:
        """What children have left on the host's disk."""
        return [str(path) for path in self.folder.glob("zygote-*/*") if path.name != "zygote"]

    def _echo(self) -> None:
        with contextlib.suppress(OSError):
            message, address = self.world.udp.recvfrom(64)
            self.world.udp.sendto(message, address)

    def close(self) -> None:
        async def end() -> None:
            for zygote in self._zygotes.values():
                await zygote.close()
            await self._cleanup.aclose()

        self._runner.run(end())
        self._runner.get_loop().remove_reader(self.world.udp)
        self._runner.close()
        self.world.close()


@pytest.fixture(scope="session")
def probed() -> Probe:
    return probe({**PROBE, **OUTER})


@pytest.fixture(scope="module", params=TIERS)
def stage(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, probed: Probe
) -> Iterator[Stage]:
    if reason := probed.layers.get(request.param, ""):
        pytest.skip(f"the tier {request.param} is not to be had here: {reason}")
    # The interpreter that the tests' environment was made from: no SDK in it.
    python = str(getattr(sys, "_base_executable", sys.executable))
    stage = Stage(request.param, tmp_path_factory.mktemp("attacks"), probed, python)
    yield stage
    stage.close()
