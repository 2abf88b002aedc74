"""A rollout that is cancelled, at any moment, leaves a whole record of itself at the proxy."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from areal_sub.config.schema import GenerationConfig, RolloutConfig
from areal_sub.records import Outcome, RunReport, RunRequest
from areal_sub.rollout.attempt import Agent, Assignment, RolloutRunner
from areal_sub.rpc import Client, Server
from areal_sub.trajectory.stream import TrajectoryStream

ASSIGNMENT = Assignment(
    rollout_id="r", group_id="g", task_id="t", split="train", data={}, policy_version=0
)


class Proxy:
    """The control plane's two calls; the one that is `held` takes until it is released."""

    def __init__(self, held: str) -> None:
        self._held = held
        self.reached = asyncio.Event()
        self.release = asyncio.Event()
        self.done: list[tuple[str, str]] = []

    async def open_rollout(self, params: dict[str, Any]) -> dict[str, Any]:
        return await self._answer("open", params)

    async def end_rollout(self, params: dict[str, Any]) -> dict[str, Any]:
        return await self._answer("end", params)

    async def _answer(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        if method == self._held:
            self.reached.set()
            await self.release.wait()
        self.done.append((method, params.get("outcome", "")))
        return {}


class Agents:
    """Returns at once."""

    async def warm(self, target: str, pickled: bytes = b"") -> list[str]:
        return []

    async def run(self, request: RunRequest) -> RunReport:
        return RunReport(
            rollout_id=request.rollout_id, outcome=Outcome.COMPLETED, result=1.0, error="",
            traceback="", stdout_tail="", stderr_tail="", exit_code=0, signal=None, wall_s=0.0,
            cpu_s=0.0, max_rss_bytes=0,
        )  # fmt: skip


class JustBetween(Agents):
    """The cancellation comes in the turn of the event loop in which the agent's report does."""

    running: asyncio.Task[Any]

    async def run(self, request: RunRequest) -> RunReport:
        self.running.cancel()
        return await super().run(request)


def test_a_cancellation_between_the_agents_end_and_ours_is_recorded(tmp_path: Path) -> None:
    async def test() -> None:
        proxy = Proxy("nothing")
        handlers = {"open_rollout": proxy.open_rollout, "end_rollout": proxy.end_rollout}
        server = Server(tmp_path / "s", handlers)
        await server.start()
        client = await Client.connect(tmp_path / "s", peer="the proxy")
        agents = JustBetween()
        runner = RolloutRunner(
            proxy=client,
            proxy_port=1,
            stream=TrajectoryStream(client),
            agents=agents,
            config=RolloutConfig(),
        )
        agent = Agent(target="a.b", pickled=b"", workflow_kwargs={})
        agents.running = asyncio.ensure_future(runner.run(ASSIGNMENT, agent, GenerationConfig()))
        with pytest.raises(asyncio.CancelledError):
            await agents.running
        assert proxy.done == [("open", ""), ("end", "cancelled")]
        await client.close()
        await server.close()

    async def main() -> None:
        async with asyncio.timeout(30):
            await test()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("held", "calls"),
    [
        ("open", [("open", ""), ("end", "cancelled")]),
        ("end", [("open", ""), ("end", "completed")]),
    ],
)
def test_a_cancellation_waits_for_the_call_that_records(
    tmp_path: Path, held: str, calls: list[tuple[str, str]]
) -> None:
    async def test() -> None:
        proxy = Proxy(held)
        handlers = {"open_rollout": proxy.open_rollout, "end_rollout": proxy.end_rollout}
        server = Server(tmp_path / "s", handlers)
        await server.start()
        client = await Client.connect(tmp_path / "s", peer="the proxy")
        runner = RolloutRunner(
            proxy=client,
            proxy_port=1,
            stream=TrajectoryStream(client),
            agents=Agents(),
            config=RolloutConfig(),
        )
        agent = Agent(target="a.b", pickled=b"", workflow_kwargs={})
        running = asyncio.ensure_future(runner.run(ASSIGNMENT, agent, GenerationConfig()))
        await proxy.reached.wait()
        running.cancel()
        await asyncio.sleep(0)  # the cancellation arrives
        assert not running.done()
        proxy.release.set()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert proxy.done == calls
        await client.close()
        await server.close()

    async def main() -> None:
        async with asyncio.timeout(30):
            await test()

    asyncio.run(main())
