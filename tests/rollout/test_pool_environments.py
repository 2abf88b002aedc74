"""A supervisor with other interpreters, programs, fresh interpreters, and renewal."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from areal_sub.errors import WorkflowError
from areal_sub.records import Outcome, RunReport, RunRequest
from areal_sub.rollout.pool import SubprocPool
from areal_sub.rpc import Client

ROOT = Path(__file__).parents[2]
TIERS = ("namespaces", "process")


def with_pool(supervisor: Any, work: Callable[[SubprocPool], Awaitable[Any]]) -> Any:
    async def go() -> Any:
        client = await Client.connect(supervisor.path, peer="supervisor", timeout_s=30.0)
        try:
            return await work(SubprocPool(client))
        finally:
            await client.close()

    return asyncio.run(go())


def run_one(supervisor: Any, request: RunRequest) -> RunReport:
    report: RunReport = with_pool(supervisor, lambda pool: pool.run(request))
    return report


@pytest.fixture
def other_python() -> str:
    """An interpreter of another version than ours; the system's where there is no other."""
    for folder in sorted(Path("~/.pyenv/versions").expanduser().glob("3.1[123]*")):
        if not folder.name.startswith(f"3.{sys.version_info[1]}."):
            return str(folder / "bin" / "python")
    return "/usr/bin/python3"


@pytest.fixture(params=TIERS)
def start(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Starts supervisors of one tier."""
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        from conftest import Supervisor
    finally:
        sys.path.pop(0)
    running: list[Any] = []

    def go(**sandbox: Any) -> Any:
        folder = Path(tempfile.mkdtemp(prefix="as-"))
        sandbox = {"tier": request.param, "reserve": 1, **sandbox}
        running.append(Supervisor(folder, environ=dict(os.environ), sandbox=sandbox))
        return running[-1]

    yield go
    for supervisor in running:
        supervisor.stop()
        shutil.rmtree(supervisor.folder)


def test_each_agent_has_its_own_interpreter_and_ours_does_not_leak(
    start: Any, make_request: Any, other_python: str
) -> None:
    supervisor = start()
    request = dataclasses.replace(make_request("", ours=sys.prefix), target="carried_agents:tells")

    async def go(pool: SubprocPool) -> list[Any]:
        requests = [
            dataclasses.replace(request, python=other_python),
            dataclasses.replace(request, target="carried_agents:Subclass", data={"reward": 0.5}),
            request,
        ]
        reports = await asyncio.gather(*map(pool.run, requests))
        assert [report.error for report in reports] == [""] * 3
        assert (await pool.stats())["num_zygotes"] == 3
        return [report.result for report in reports]

    foreign, subclass, default = with_pool(supervisor, go)
    assert subclass == 0.5
    for told in (foreign, default):
        assert told["num_leaked"] == 0
        assert told["carried"] == 1.0
    assert default["minor"] == sys.version_info[1]
    if "pyenv" in other_python:
        assert foreign["minor"] != sys.version_info[1]


@pytest.mark.skipif(ROOT.is_relative_to("/tmp"), reason="/tmp shows the agents, so it is read-only")
@pytest.mark.parametrize("start", ["namespaces"], indirect=True)
def test_tmp_is_the_childs_own_in_a_foreign_interpreter_too(
    start: Any, make_request: Any, other_python: str
) -> None:
    request = dataclasses.replace(make_request(""), target="writes_to_tmp:agent")
    report = run_one(start(), dataclasses.replace(request, python=other_python))
    assert (report.outcome, report.result, report.error) == (Outcome.COMPLETED, 1.0, "")


def test_an_interpreter_that_is_not_there_is_told_before_any_rollout(start: Any) -> None:
    supervisor = start()
    with pytest.raises(WorkflowError, match="cannot start '/nowhere/python'"):
        with_pool(supervisor, lambda pool: pool.warm("a:b", python="/nowhere/python"))


def program(make_request: Any, script: str, **fields: Any) -> RunRequest:
    request: RunRequest = make_request("")
    fields = {"reward": "last_line", **fields}
    return dataclasses.replace(request, argv=["/bin/sh", "-c", script], **fields)


@pytest.mark.parametrize(
    ("script", "fields", "outcome", "result"),
    [
        ("echo thinking; echo 0.5", {}, Outcome.COMPLETED, 0.5),
        ('echo "{\\"reward\\": $OPENAI_API_KEY}"', {}, Outcome.COMPLETED, 7.0),
        ("cat; cat a/b.txt", {"stdin": "x\n", "files": {"a/b.txt": "2"}}, Outcome.COMPLETED, 2.0),
        (
            "mkdir o; echo 0.5 > o/s; echo 0.25",
            {"reward": "file:o/s", "outputs": ["o/s"]},
            Outcome.COMPLETED,
            0.5,
        ),
        (
            "ln -s /etc/hostname s",
            {"reward": "file:s", "outputs": ["s"]},
            Outcome.INVALID_RESULT,
            None,
        ),
        ("exit 1", {"reward": "exit_code"}, Outcome.COMPLETED, 0.0),
        ("exit 0", {"reward": "exit_code"}, Outcome.COMPLETED, 1.0),
        ("echo no config >&2; exit 3", {}, Outcome.EXITED, None),
        ("echo done", {}, Outcome.INVALID_RESULT, None),
        ("kill -9 $$", {"reward": "exit_code"}, Outcome.KILLED, None),
        ("while :; do :; done", {"timeout_s": 0.5}, Outcome.TIMEOUT, None),
    ],
)
def test_programs_and_their_rewards(
    start: Any, make_request: Any, script: str, fields: Any, outcome: Outcome, result: Any
) -> None:
    fields = {"env": {"OPENAI_API_KEY": "7"}, **fields}
    report = run_one(start(), program(make_request, script, **fields))
    assert (report.outcome, report.result) == (outcome, result), report
    if "config" in script:
        assert report.error == "exited with code 3; its last words: no config"


def test_a_program_that_is_not_there(start: Any, make_request: Any) -> None:
    request = dataclasses.replace(make_request(""), argv=["no-such-program"], reward="exit_code")
    report = run_one(start(), request)
    assert report.outcome is Outcome.EXITED
    assert "cannot execute 'no-such-program': No such file" in report.error


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node on this machine")
def test_a_node_agent(start: Any, make_request: Any) -> None:
    code = "console.log(JSON.stringify({reward: Number(process.argv[2]) / 4}))"
    argv = [str(shutil.which("node")), "agent.js", "3"]
    request = dataclasses.replace(
        make_request(""), argv=argv, files={"agent.js": code}, reward="last_line"
    )
    report = run_one(start(), request)
    assert (report.outcome, report.result) == (Outcome.COMPLETED, 0.75), report


def test_a_fresh_interpreter_for_each_child(start: Any, make_request: Any) -> None:
    """The agent's class counts its instances: never more than one, where each child imports it."""
    supervisor = start(start="exec")

    async def go(pool: SubprocPool) -> list[RunReport]:
        assert await pool.warm("rollout_agents:Scaled") == []
        with pytest.raises(WorkflowError, match="ZeroDivisionError") as caught:
            await pool.warm("broken_agent:agent")
        assert "broken_agent.py" in str(caught.value)
        request = make_request("Scaled", reward=1.0)
        return list(await asyncio.gather(*(pool.run(request) for _ in range(3))))

    for report in with_pool(supervisor, go):
        assert (report.outcome, report.result) == (Outcome.COMPLETED, 1.0), report


def test_a_zygote_is_replaced_after_so_many_children_and_none_is_lost(
    start: Any, make_request: Any
) -> None:
    supervisor = start(recycle_after=3, reserve=2)

    async def go(pool: SubprocPool) -> tuple[list[RunReport], dict[str, float]]:
        long = asyncio.ensure_future(pool.run(make_request("sleeps", seconds=2.0)))
        reports = []
        for _ in range(8):
            request = make_request("reward", reward=1.0)
            reports += await asyncio.gather(*(pool.run(request) for _ in range(2)))
        return [await long, *reports], await pool.stats()

    reports, stats = with_pool(supervisor, go)
    assert {report.outcome for report in reports} == {Outcome.COMPLETED}
    assert stats["num_renewed"] >= 1
    assert stats["num_restarts"] == 0
