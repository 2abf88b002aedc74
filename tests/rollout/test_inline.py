"""The inline runner: the pool's outcomes, in the trainer's own loop, with one shared client."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from areal_sub.errors import WorkflowError
from areal_sub.records import Outcome, RunReport
from areal_sub.rollout import inline
from areal_sub.rollout.inline import InlineRunner


@pytest.fixture(autouse=True)
def agents_are_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "agents"))
    yield
    sys.modules.pop("rollout_agents", None)


def run_all(*requests: Any) -> list[RunReport]:
    async def go() -> list[RunReport]:
        runner = InlineRunner()
        try:
            return list(await asyncio.gather(*map(runner.run, requests)))
        finally:
            await runner.close()

    return asyncio.run(go())


def run(request: Any) -> RunReport:
    return run_all(request)[0]


def test_an_agent_whose_framework_is_not_here_is_told_where_it_can_run(make_request: Any) -> None:
    request = dataclasses.replace(make_request(""), target="needs_a_framework:agent")
    report = run(request)
    assert report.outcome is Outcome.START_FAILED
    assert "No module named 'not_to_be_had'" in report.error
    assert f"{sys.executable} (Python 3.{sys.version_info.minor})" in report.error
    assert "rollout.openai.mode=subproc" in report.error


@pytest.mark.parametrize("reward", [0.5, 1, True, {"turn": 1.0}])
def test_a_reward_comes_back(make_request: Any, reward: Any) -> None:
    report = run(make_request("reward", reward=reward))
    assert (report.outcome, report.result, report.error) == (Outcome.COMPLETED, reward, "")


def test_a_class_is_constructed_for_each_rollout(make_request: Any) -> None:
    request = make_request("Scaled", reward=2.0, workflow_kwargs={"scale": 2.0})
    assert [report.result for report in run_all(request, request)] == [4.0, 4.0]
    assert sys.modules["rollout_agents"].Scaled.made == 2


def test_extra_kwargs_are_what_the_environment_says(make_request: Any) -> None:
    report = run(make_request("takes_the_url"))
    assert report.result == {"http://127.0.0.1:9/v1": 1.0}


def test_what_the_agent_does_stays_its_own(make_request: Any) -> None:
    raised, left, cancelled, fine = run_all(
        *(
            make_request(name, reward=1.0)
            for name in ("raises", "exits", "cancels_itself", "reward")
        )
    )
    assert (raised.outcome, raised.error) == (Outcome.EXCEPTION, "ValueError: the agent's own")
    assert "in raises" in raised.traceback
    assert left.outcome is Outcome.EXITED
    assert cancelled.outcome is Outcome.EXCEPTION
    assert fine.outcome is Outcome.COMPLETED


def test_a_hanging_agent_times_out(make_request: Any) -> None:
    report = run(make_request("hangs", timeout_s=0.05))
    assert (report.outcome, report.error) == (Outcome.TIMEOUT, "did not end within 0.05 s")


def test_an_agent_that_ignores_cancelling_is_left_behind_in_time(
    make_request: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(inline, "CANCEL_GRACE_S", 0.05)

    async def go() -> RunReport:
        request = make_request("hangs_on", timeout_s=0.05)
        runner = InlineRunner()
        report = await runner.run(request)
        request.data["released"] = True
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})
        await runner.close()
        return report

    assert asyncio.run(go()).outcome is Outcome.TIMEOUT
    assert "left behind" in caplog.text


def test_cancelling_the_run_cancels_the_agent(make_request: Any) -> None:
    async def go() -> int:
        runner = InlineRunner()
        run = asyncio.ensure_future(runner.run(make_request("hangs")))
        await asyncio.sleep(0)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        await runner.close()
        return len(asyncio.all_tasks())

    assert asyncio.run(go()) == 1


@pytest.mark.parametrize(
    ("agent", "complaint"),
    [
        ("sync_reward", "is not async"),
        ("takes_nothing", "add **extra_kwargs"),
        ("rewrad", "did you mean 'reward'"),
        ("Scaled", "unexpected keyword"),
    ],
)
def test_what_cannot_run_inline_does_not_start(
    make_request: Any, agent: str, complaint: str
) -> None:
    kwargs = {"wrong": 1} if agent == "Scaled" else {}
    report = run(make_request(agent, reward=1.0, workflow_kwargs=kwargs))
    assert report.outcome is Outcome.START_FAILED
    assert complaint in report.error


def test_warm_says_what_is_wrong_before_any_rollout() -> None:
    runner = InlineRunner()
    assert asyncio.run(runner.warm("rollout_agents:reward")) == []
    with pytest.raises(WorkflowError, match="ZeroDivisionError"):
        asyncio.run(runner.warm("broken_agent:agent"))
    with pytest.raises(WorkflowError, match="subproc"):
        asyncio.run(runner.warm("", b"pickled"))


def test_all_rollouts_share_one_client_that_no_agent_can_close(make_request: Any) -> None:
    connections = 0
    disconnected = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        body = json.dumps(ANSWER).encode()
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = head.partition(b"content-length:")[2].split(b"\r\n")[0]
                await reader.readexactly(int(length))
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
                    b"content-length: %d\r\n\r\n%b" % (len(body), body)
                )
        except asyncio.IncompleteReadError:
            writer.close()
            await writer.wait_closed()
            disconnected.set()

    async def go() -> list[RunReport]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        request = make_request("chats", env={"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "key"})
        runner = InlineRunner()
        # one after the other: the agent closes its client, and the next one's call still works
        reports = [await runner.run(request) for _ in range(3)]
        await runner.close()
        async with asyncio.timeout(10):
            await disconnected.wait()
        server.close()
        await server.wait_closed()
        return reports

    reports = asyncio.run(go())
    assert [(report.outcome, report.result) for report in reports] == [
        (Outcome.COMPLETED, 0.75)
    ] * 3
    assert connections == 1


ANSWER = {
    "id": "c",
    "object": "chat.completion",
    "created": 1,
    "model": "any",
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "0.75"},
        }
    ],
}
