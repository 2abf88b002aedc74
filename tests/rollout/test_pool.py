"""Pool and supervisor, as processes: every outcome by name, limits, restarts, and a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import dill
import psutil
import pytest

from areal_sub.errors import PeerGone, TaskError, WorkflowError
from areal_sub.records import Outcome, RunReport
from areal_sub.rollout.pool import SubprocPool, check_plain
from areal_sub.rpc import Client

AGENTS = Path(__file__).parent / "agents"
ROOT = Path(__file__).parents[2]


def with_pool(supervisor: Any, work: Callable[[SubprocPool], Awaitable[Any]]) -> Any:
    async def go() -> Any:
        client = await Client.connect(supervisor.path, peer="supervisor", timeout_s=30.0)
        try:
            return await work(SubprocPool(client))
        finally:
            await client.close()

    return asyncio.run(go())


@pytest.mark.parametrize("reward", [0.5, 1, True, {"turn-1": 0.25}])
def test_a_reward_comes_back(supervisor: Any, make_request: Any, reward: Any) -> None:
    report = with_pool(supervisor, lambda pool: pool.run(make_request("reward", reward=reward)))
    assert (report.outcome, report.result) == (Outcome.COMPLETED, reward)
    assert report.rollout_id == "rollout-1"
    assert report.cpu_s > 0
    assert report.max_rss_bytes > 2**20


@pytest.mark.parametrize(
    "outcome",
    ["exception", "exited", "killed", "timeout", "output_limit", "result_limit", "invalid_result"],
)
def test_each_way_to_fail_has_its_name(supervisor: Any, make_request: Any, outcome: str) -> None:
    limit_s = 0.5 if outcome == "timeout" else 30.0
    request = make_request("behaves", timeout_s=limit_s, **{"as": outcome})
    report = with_pool(supervisor, lambda pool: pool.run(request))
    assert report.outcome == outcome
    assert report.error
    assert ("a reward is a number" in report.error) == (outcome == "invalid_result")
    assert report.result is None
    assert ("in behaves" in report.traceback) == (outcome == "exception")


def test_workflow_kwargs_construct_and_dill_carries(supervisor: Any, make_request: Any) -> None:
    request = make_request("Scaled", reward=2.0, workflow_kwargs={"scale": 1.5})
    assert with_pool(supervisor, lambda pool: pool.run(request)).result == 3.0
    broken = make_request("", pickled=dill.dumps(len)[:-5])
    report = with_pool(supervisor, lambda pool: pool.run(broken))
    assert report.outcome is Outcome.START_FAILED


def test_an_import_finds_what_is_set_for_every_rollout(supervisor: Any, make_request: Any) -> None:
    async def go(pool: SubprocPool) -> RunReport:
        names = ["HF_HUB_OFFLINE", "OPENAI_API_KEY"]
        env = {"HF_HUB_OFFLINE": "1"}
        request = make_request("", names=names, env={**env, "OPENAI_API_KEY": "k"})
        request = dataclasses.replace(request, target="reads_at_import:agent", import_env=env)
        assert await pool.warm(request.target, env=env) == []
        num_zygotes = (await pool.stats())["num_zygotes"]
        report = await pool.run(request)
        assert (await pool.stats())["num_zygotes"] == num_zygotes
        return report

    report = with_pool(supervisor, go)
    assert report.result == {"HF_HUB_OFFLINE": ["1", "1"], "OPENAI_API_KEY": [None, "k"]}


def test_an_import_error_is_known_before_any_rollout(supervisor: Any, make_request: Any) -> None:
    async def go(pool: SubprocPool) -> RunReport:
        assert await pool.warm("rollout_agents:reward") == []
        with pytest.raises(WorkflowError, match="did you mean 'rollout_agents'"):
            await pool.warm("rolout_agents:reward")
        with pytest.raises(WorkflowError, match="ZeroDivisionError") as caught:
            await pool.warm("broken_agent:agent")
        assert "broken_agent.py" in str(caught.value)
        assert not str(caught.value).startswith("supervisor")
        request = make_request("reward")
        return await pool.run(type(request)(**{**fields(request), "target": "broken_agent:agent"}))

    report = with_pool(supervisor, go)
    assert report.outcome is Outcome.START_FAILED
    assert "1 / 0" in report.traceback


def test_an_agent_that_wants_a_key_at_its_import_is_told_what_to_do(supervisor: Any) -> None:
    with pytest.raises(WorkflowError, match=r"(?s)OPENAI_API_KEY.*\n.*sandbox\.start=exec\.$"):
        with_pool(supervisor, lambda pool: pool.warm("client_at_import:agent"))
    with pytest.raises(WorkflowError) as caught:
        with_pool(supervisor, lambda pool: pool.warm("broken_agent:agent"))
    assert "start=exec" not in str(caught.value)


def fields(request: Any) -> dict[str, Any]:
    values: dict[str, Any] = request.to_map()
    return {name: value for name, value in values.items() if name not in ("kind", "v")}


def test_a_child_sees_the_allowlist_and_no_secret(supervisor: Any, make_request: Any) -> None:
    env = {"OPENAI_API_KEY": "key-of-the-rollout"}
    request = make_request("behaves", env=env, **{"as": "environ"})
    seen = with_pool(supervisor, lambda pool: pool.run(request)).result
    assert seen["OPENAI_API_KEY"] == "key-of-the-rollout"
    assert seen["LET_THROUGH"] == "yes"
    assert "canary" not in str(seen)
    own = Path(f"/proc/{supervisor.process.pid}/environ").read_text()
    assert "canary" not in own, "a child of the same user can read this"


@pytest.mark.parametrize(
    ("data", "where"),
    [
        ({"image": b"raw"}, r"the task\['image'\] is of type bytes"),
        ({"rows": [{1: 2}]}, r"the task\['rows'\]\[0\] has the key 1"),
        ({"n": 2**70}, "more than 64 bits"),
        ({"s": "\ud800"}, "surrogate"),
        ({"s": {"\ud800": 1}}, "surrogate"),
    ],
)
def test_a_task_that_cannot_travel_fails_alone_and_by_name(
    supervisor: Any, make_request: Any, data: dict[str, Any], where: str
) -> None:
    with pytest.raises(TaskError, match=where):
        check_plain(data, "the task")
    report = with_pool(supervisor, lambda pool: pool.run(make_request("reward", **data)))
    assert report.outcome is Outcome.START_FAILED
    assert report.error


def test_a_task_without_end_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(TaskError, match="nested"):
        check_plain({"x": endless}, "the task")


def test_more_rollouts_than_children_wait_their_turn(supervisor: Any, make_request: Any) -> None:
    async def go(pool: SubprocPool) -> list[RunReport]:
        runs = [pool.run(make_request("reward", reward=float(n))) for n in range(50)]
        reports = await asyncio.gather(*runs)
        stats = await pool.stats()
        assert stats["num_running"] == stats["num_waiting"] == 0
        assert stats["num_finished"] >= 50
        return list(reports)

    reports = with_pool(supervisor, go)
    assert [report.result for report in reports] == list(range(50))


def test_cancelling_kills_the_child(supervisor: Any, make_request: Any) -> None:
    top = supervisor.process.pid

    async def go(pool: SubprocPool) -> None:
        request = make_request("leaves_daemon", name="d-cancelled", hang=True)
        run = asyncio.ensure_future(pool.run(request))
        await asyncio.to_thread(eventually, lambda: below(top, "d-cancelled"))
        run.cancel()
        await asyncio.gather(run, return_exceptions=True)
        await asyncio.to_thread(eventually, lambda: not below(top, "d-cancelled"))

    with_pool(supervisor, go)


def test_a_zygote_that_dies_is_started_again(supervisor: Any, make_request: Any) -> None:
    async def go(pool: SubprocPool) -> tuple[RunReport, float]:
        await pool.warm("rollout_agents:reward")
        before = (await pool.stats())["num_restarts"]
        for child in psutil.Process(supervisor.process.pid).children():
            child.kill()
        await asyncio.to_thread(
            eventually, lambda: not psutil.Process(supervisor.process.pid).children()
        )
        report = await pool.run(make_request("reward", reward=1.0))
        return report, (await pool.stats())["num_restarts"] - before

    report, num_restarts = with_pool(supervisor, go)
    assert (report.outcome, report.result) == (Outcome.COMPLETED, 1.0)
    assert num_restarts == 1


def test_an_agent_that_kills_all_above_it_reaches_nobody(
    supervisor: Any, make_request: Any
) -> None:
    async def go(pool: SubprocPool) -> tuple[RunReport, float]:
        await pool.warm("rollout_agents:leaves_daemon")
        before = (await pool.stats())["num_restarts"]
        report = await pool.run(make_request("leaves_daemon", name="d-killer", kill_above=True))
        return report, (await pool.stats())["num_restarts"] - before

    report, num_restarts = with_pool(supervisor, go)
    assert (report.outcome, num_restarts) == (Outcome.COMPLETED, 0)
    assert not below(supervisor.process.pid, "d-killer")


TRAINER = """
import asyncio, sys
from pathlib import Path
sys.path[:0] = sys.argv[3:5]
from conftest import Supervisor
from areal_sub.records import RunRequest
from areal_sub.rollout.pool import SubprocPool
from areal_sub.rpc import Client

async def main():
    folder = Path(sys.argv[1])
    supervisor = Supervisor(folder, environ={})
    client = await Client.connect(supervisor.path, peer="supervisor", timeout_s=30.0)
    pool = SubprocPool(client)
    await asyncio.gather(*(pool.run(RunRequest(
        rollout_id=str(n), target="rollout_agents:leaves_daemon", pickled=b"", workflow_kwargs={},
        data={"name": f"d-{n}", "hang": n != 0}, env={}, timeout_s=60.0,
    )) for n in range(int(sys.argv[2]))))

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_when_the_trainer_dies_nothing_is_left_alive(tmp_path: Path, number: int) -> None:
    own = [str(Path(__file__).parent), str(ROOT)]
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(tmp_path), "3", *own], stderr=subprocess.DEVNULL
    )
    try:
        eventually(lambda: below(trainer.pid, "d-1") and below(trainer.pid, "d-2"))
        family = psutil.Process(trainer.pid).children(recursive=True)
        # supervisor, guardian, zygote, and of each of the two: init, agent, daemon
        assert len(family) >= 9
    finally:
        trainer.send_signal(number)
        trainer.wait()
    eventually(lambda: not [p for p in family if p.is_running()], timeout_s=5.0)
    assert not (tmp_path / "children").exists()


def test_when_the_supervisor_is_killed_its_callers_know_and_its_children_die(
    tmp_path: Path, make_request: Any
) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        from conftest import Supervisor
    finally:
        sys.path.pop(0)
    supervisor = Supervisor(tmp_path, environ=dict(os.environ))

    async def go(pool: SubprocPool) -> list[psutil.Process]:
        run = asyncio.ensure_future(pool.run(make_request("leaves_daemon", name="d", hang=True)))
        await asyncio.to_thread(eventually, lambda: below(supervisor.process.pid, "d"))
        family = psutil.Process(supervisor.process.pid).children(recursive=True)
        supervisor.process.kill()
        with pytest.raises(PeerGone):
            await run
        return list(family)

    family = with_pool(supervisor, go)
    supervisor.process.wait()
    assert supervisor.process.stdin is not None
    supervisor.process.stdin.close()
    eventually(lambda: not [p for p in family if p.is_running()], timeout_s=5.0)


def below(pid: int, name: str) -> list[psutil.Process]:
    """The processes called `name` below `pid`, as the host sees them."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() == name:
                found.append(process)
    return found


def eventually(condition: Callable[[], Any], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.005)


def test_an_allowlist_is_shown_and_what_it_refuses_is_reported(
    start_supervisor: Any, make_request: Any, tmp_path: Path
) -> None:
    listeners = tmp_path / "l"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        with contextlib.chdir(tmp_path):  # paths of Unix sockets are short
            door.bind("l")
        door.listen()

        def run_with(*allow: str, tier: str = "namespaces") -> Any:
            async def work(pool: SubprocPool) -> Any:
                line = await pool.attach(port=8080, listeners=listeners, timeout_s=30.0)
                request = make_request("asks_the_web", url="http://evil.example/", env={})
                return line, await pool.run(request)

            sandbox = {"tier": tier, "network": {"allow": list(allow)}}
            supervisor = start_supervisor(tmp_path, environ=dict(os.environ), sandbox=sandbox)
            try:
                return with_pool(supervisor, work)
            finally:
                supervisor.stop()

        line, report = run_with("api.example.com:443", "10.0.0.7:80")
        assert line == "tier namespaces, which lets agents reach api.example.com:443, 10.0.0.7:80"
        refusal = "evil.example:80 is not allowed: see sandbox.network.allow"
        assert (report.outcome, report.error) == (Outcome.EXCEPTION, f"RuntimeError: {refusal}")
        assert report.egress_refused == {"evil.example:80": 1}
        with pytest.raises(WorkflowError, match=r"rollout\.openai\.sandbox: allow: '127\.1:80'"):
            run_with("127.1:80")
        with pytest.raises(WorkflowError, match="takes the tier 'namespaces'"):
            run_with("api.example.com:443", tier="process")
