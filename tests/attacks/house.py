"""The house that attacks 59 to 68 aim at: a real proxy process, with rollouts of others in it.

The engine is a stub in this process. The proxy may have few descriptors, so that what would take
tens of thousands of connections shows with thousands. An honest rollout calls all the time while
an attack lasts, each time by a new connection, and must not notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stub_engine import StubEngine, make_model_folder

from areal_sub.proxy.vocabulary import Vocabulary
from areal_sub.records import EndRecord, TrajectoryRecord, TurnRecord, decode_record
from areal_sub.rpc import Client, Server
from areal_sub.trajectory.journal import read_journal

ROOT = Path(__file__).parents[2]
NUM_FILES = 1024
MAX_TURNS = 40
MAX_NEW_TOKENS = 3000
MIB = 2**20
PATIENCE_S = 20.0
"""An honest call that takes longer has failed."""


@dataclass
class Witnessed:
    """What was seen from outside while an attack lasted."""

    latencies_s: list[float] = field(default_factory=list)  # of honest calls
    grown_bytes: int = 0  # the proxy's memory at its peak, against before


class House:
    def __init__(self, folder: Path, engine: StubEngine, process: Any, control: Client) -> None:
        self.folder = folder
        self.engine = engine
        self.process = process
        self.control = control
        self.port = 0
        self.log = b""

    @classmethod
    @contextlib.asynccontextmanager
    async def serving(
        cls, folder: Path, model: Path | None = None, engine_path: Path | None = None
    ) -> AsyncIterator[House]:
        """`model` and `engine_path`: of a real engine, where there is one."""
        model = model or make_model_folder(folder / "model")
        engine = StubEngine(Vocabulary(model))
        handlers = {"info": engine.info, "generate": engine.generate}
        settings = {
            "agent_host": "127.0.0.1",
            "agent_port": 0,
            "control_path": str(folder / "proxy.sock"),
            "listeners_path": str(folder / "listeners.sock"),
            "engine_path": str(engine_path or folder / "engine.sock"),
            "journal_path": str(folder / "journal.bin"),
            "tokenizer_path": str(model),
            "chat_template": None,
            "tool_call_parser": "auto",
            "reasoning_parser": "none",
            "request_timeout_s": 60.0,
        }
        (folder / "settings.json").write_text(json.dumps(settings))
        server = Server(folder / "engine.sock", handlers)
        await server.start()
        with (folder / "proxy.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-W", "error", "-m", "areal_sub.proxy"),
                str(folder / "settings.json"),
                stdin=asyncio.subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                preexec_fn=_few_files,
            )
        assert process.stdin is not None
        control = await Client.connect(folder / "proxy.sock", peer="proxy", timeout_s=60)
        house = cls(folder, engine, process, control)
        try:
            house.port = (await control.call("info", timeout_s=10))["agent_port"]
            yield house
        finally:
            await control.close()
            process.stdin.close()
            assert await asyncio.wait_for(process.wait(), PATIENCE_S) == 0
            await server.close()

    async def open(self, name: str, *, transcript: bool = False) -> tuple[str, str]:
        """A rollout: its id and its key."""
        rollout_id, key = f"{name}-{secrets.token_hex(4)}", secrets.token_urlsafe(24)
        gconfig = {
            "max_new_tokens": MAX_NEW_TOKENS,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "override_agent": True,
        }
        params = {
            "rollout_id": rollout_id,
            "key": key,
            "group_id": "g",
            "task_id": "t",
            "split": "train",
            "policy_version": 0,
            "max_turns": 10**6 if name == "honest" else MAX_TURNS,
            "gconfig": gconfig,
            "transcript": transcript,
        }
        await self.control.call("open_rollout", params, timeout_s=PATIENCE_S)
        return rollout_id, key

    async def end(self, rollout_id: str) -> EndRecord:
        params = {
            "rollout_id": rollout_id,
            "outcome": "exception",
            "reward": None,
            "turn_rewards": {},
            "error": "",
            "traceback": "",
            "stdout_tail": "",
            "stderr_tail": "",
            "wall_s": 1.0,
            "cpu_s": 0.5,
            "max_rss_bytes": 1000,
            "egress_refused": {},
            "written_bytes": 0,
            "peak_memory_bytes": 0,
        }
        await self.control.call("end_rollout", params, timeout_s=PATIENCE_S)
        ends = [each for each in self.records(rollout_id) if isinstance(each, EndRecord)]
        assert len(ends) == 1
        return ends[0]

    async def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = await self.control.call("stats", timeout_s=PATIENCE_S)
        return stats

    def hand_over(self, rollout_id: str, fd: int) -> None:
        """A child's listener, as the supervisor does it."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
            with contextlib.chdir(self.folder):  # paths of Unix sockets are short
                door.connect("listeners.sock")
            socket.send_fds(door, [rollout_id.encode()], [fd])

    def records(self, rollout_id: str) -> list[TrajectoryRecord]:
        records = [decode_record(raw) for _, raw in read_journal(self.folder / "journal.bin")]
        return [record for record in records if record.rollout_id == rollout_id]

    def num_turns(self, rollout_id: str) -> int:
        return sum(isinstance(each, TurnRecord) for each in self.records(rollout_id))

    def num_files(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    async def ask(self, key: str, body: dict[str, Any] | None = None) -> int:
        """An honest call on a connection of its own: its status."""
        body = body or {"messages": [{"role": "user", "content": "?"}], "max_tokens": 4}
        raw = json.dumps(body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: h\r\nauthorization: Bearer {key}"
            head += f"\r\nconnection: close\r\ncontent-length: {len(raw)}\r\n\r\n"
            writer.write(head.encode() + raw)
            answer = await reader.read()
            if not answer:
                raise ConnectionResetError
            return int(answer.split()[1])
        finally:
            writer.close()

    @contextlib.asynccontextmanager
    async def witnessing(self) -> AsyncIterator[Witnessed]:
        """Calls honestly meanwhile; and at the end is asked once more. Raises where one fails."""
        witnessed = Witnessed()
        rollout_id, key = await self.open("honest")
        stop = asyncio.Event()

        async def call() -> None:
            """As SDKs do it: where the connection is cut, once more, and once more."""
            started = time.monotonic()
            async with asyncio.timeout(PATIENCE_S):
                for _ in range(2):
                    with contextlib.suppress(ConnectionError):
                        assert await self.ask(key) == 200
                        break
                else:
                    assert await self.ask(key) == 200
            witnessed.latencies_s.append(time.monotonic() - started)

        async def calls() -> None:
            while not stop.is_set():
                await call()
                await asyncio.wait({waiting}, timeout=0.05)

        waiting = asyncio.ensure_future(stop.wait())
        calling = asyncio.ensure_future(calls())
        before = self._forget_peak()
        try:
            yield witnessed
        finally:
            stop.set()
            await asyncio.gather(waiting, calling)
        await call()
        witnessed.grown_bytes = self._memory("VmHWM") - before
        ended = await self.end(rollout_id)
        assert ended.num_turns == len(witnessed.latencies_s)
        assert (ended.num_rejected_calls, ended.tampering) == (0, {})
        assert self.process.returncode is None

    def _memory(self, name: str) -> int:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    def _forget_peak(self) -> int:
        """And what the proxy has now."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")
        return self._memory("VmRSS")


def _few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (NUM_FILES, NUM_FILES))
