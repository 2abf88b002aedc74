"""A task names its files by plain names only; they come in, and outputs come with the report."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from areal_sub.config import parse_config
from areal_sub.errors import ConfigError, TaskError
from areal_sub.records import Outcome, RunReport, RunRequest
from areal_sub.rollout.attempt import Agent, Assignment, RolloutRunner
from areal_sub.rollout.pool import SubprocPool
from areal_sub.rollout.workspace import fixed_part, workspace_of
from areal_sub.rpc import Client
from areal_sub.trainer.settings import _around_workspaces, _check_there
from sandbox.probe import probe

BASE = Path("/project")


@pytest.mark.parametrize(
    ("template", "data", "folder"),
    [
        (None, {}, ""),
        ("repo", {}, "/project/repo"),
        ("tasks/{id}/repo", {"id": "t-1"}, "/project/tasks/t-1/repo"),
        ("/data/{id}-{part}", {"id": 7, "part": "é x"}, "/data/7-é x"),
        ("a{{b}}/{id}", {"id": "..."}, "/project/a{b}/..."),
    ],
)
def test_a_template_is_filled(template: str | None, data: dict[str, Any], folder: str) -> None:
    assert workspace_of(template, data, BASE) == folder


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("..", "no plain name: '..'"),
        (".", "no plain name"),
        ("", "no plain name"),
        ("a/b", "no plain name: 'a/b'"),
        ("/etc", "no plain name"),
        ("a\0b", "no plain name"),
        ("a\nb", "no plain name"),
        ("\ud800", "no plain name"),
        (True, "is bool, not a name"),
        (1.5, "is float, not a name"),
        (["x"], "is list, not a name"),
        (None, "is NoneType, not a name"),
    ],
)
def test_a_task_cannot_lead_elsewhere(value: Any, complaint: str) -> None:
    with pytest.raises(TaskError, match=f"the task's 'id' .*{complaint}"):
        workspace_of("tasks/{id}", {"id": value}, BASE)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(TaskError, match="no field 'id'; it has question, name"):
        workspace_of("tasks/{id}", {"question": "?", "name": "x"}, BASE)


@pytest.mark.parametrize(
    ("template", "folder"),
    [
        ("tasks/{id}/repo", "/project/tasks"),
        ("tasks/x-{id}", "/project/tasks"),
        ("repo", "/project/repo"),
        ("{id}", "/project"),
        ("a{{b}}/{id}", "/project/a{b}"),
        ("/data/{id}", "/data"),
    ],
)
def test_what_is_around_all_workspaces(template: str, folder: str) -> None:
    assert str(fixed_part(template, BASE)) == folder


def test_workspaces_are_hidden_and_agents_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = os.path.realpath(tmp_path)
    assert _around_workspaces("tasks/{id}", [here]) == f"{here}/tasks"
    with pytest.raises(ConfigError, match="put workspaces into a folder of their own"):
        _around_workspaces("{id}", [here])


def test_folders_that_agents_are_to_read_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    _check_there("readable", ["data", str(tmp_path)])
    for absent in ("date", ""):
        with pytest.raises(ConfigError, match=f"readable: there is no '{absent}'"):
            _check_there("readable", ["data", absent])


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"workspace": "tasks/{id.x}"}, "{id.x} is not the name of a field"),
        ({"workspace": "tasks/{}"}, "{} is not the name of a field"),
        ({"workspace": "tasks/{id!r}"}, "{id} is not the name of a field"),
        ({"workspace": "tasks/{id"}, "a plain brace is written twice"),
    ],
)
def test_a_wrong_template_is_refused_early(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(None, [], base={"rollout": {"openai": {"sandbox": settings}}})
    assert f"rollout.openai.sandbox.workspace: {settings['workspace']}: " in str(caught.value)
    assert complaint in str(caught.value)


def test_inline_agents_have_no_files(tmp_path: Path) -> None:
    openai = {"mode": "inline", "sandbox": {"outputs": ["x"]}}
    with pytest.raises(ConfigError, match="need mode=subproc"):
        parse_config(None, [], base={"rollout": {"openai": openai}})


class Recorder:
    """An `AgentRunner` that says what it was asked for."""

    def __init__(self) -> None:
        self.requests: list[RunRequest] = []

    async def warm(self, target: str, pickled: bytes = b"") -> list[str]:
        return []

    async def run(self, request: RunRequest) -> RunReport:
        self.requests.append(request)
        raise TaskError("recorded")


def test_a_task_without_its_files_costs_only_its_rollout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base: dict[str, Any] = {"sandbox": {"workspace": "tasks/{id}", "outputs": ["out"]}}
    overrides = ["experiment_name=e", "trial_name=t", "actor.path=m", "train_dataset.path=t"]
    config = parse_config(None, overrides, base={"rollout": {"openai": base}})
    agents = Recorder()
    nothing: Any = None
    runner = RolloutRunner(
        proxy=nothing, proxy_port=1, stream=nothing, agents=agents, config=config.rollout
    )

    def run(data: dict[str, Any]) -> RunReport:
        assignment = Assignment(
            rollout_id="r", group_id="g", task_id="t", split="train", data=data, policy_version=0
        )
        agent = Agent(target="a:b", pickled=b"", workflow_kwargs={})
        return asyncio.run(runner._run_agent(assignment, agent, "key"))

    report = run({"id": "../x"})
    assert report.outcome is Outcome.START_FAILED
    assert "no plain name: '../x'" in report.error
    assert agents.requests == []
    run({"id": "x"})
    (request,) = agents.requests
    assert (request.workspace, request.outputs) == (str(tmp_path / "tasks" / "x"), ["out"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "question").write_text("6 * 7")
    yield folder
    assert [path.name for path in folder.iterdir()] == ["question"]


def test_files_go_in_and_outputs_come_back(
    supervisor: Any, make_request: Any, folder: Path
) -> None:
    async def go(**changes: Any) -> RunReport:
        client = await Client.connect(supervisor.path, peer="supervisor", timeout_s=30.0)
        try:
            request = make_request("answers_in_a_file")
            values = {k: v for k, v in request.to_map().items() if k not in ("kind", "v")}
            return await SubprocPool(client).run(RunRequest(**(values | changes)))
        finally:
            await client.close()

    outputs = ["answer", "link", "none"]
    report = asyncio.run(go(workspace=str(folder), outputs=outputs))
    assert (report.outcome, report.result) == (Outcome.COMPLETED, 1.0)
    assert report.outputs == {"answer": b"42"}
    assert report.outputs_refused == [["link", "it is a symbolic link"]]
    assert report.outputs_missing == ["none"]
    assert report.written_bytes >= 4096
    has_groups = not probe().layers["cgroups"]
    assert (report.peak_memory_bytes > 2**20) == has_groups
    absent = asyncio.run(go(workspace=str(folder / "absent")))
    assert absent.outcome is Outcome.START_FAILED
    assert "absent' cannot be read: No such file" in absent.error
