"""No process and no file of a child outlives it, whatever it does to the processes above it."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from sandbox import ChildReport, Ending, ZygoteFailed, run
from sandbox.folders import PARTS, make_private, remove_tree

AGENTS = Path(__file__).parent / "agents"
Alive = Callable[[int], bool]
Eventually = Callable[..., None]


def test_daemons_are_dead_when_the_run_returns(lab: Any, tmp_path: Path, alive: Alive) -> None:
    files = [tmp_path / str(number) for number in range(3)]
    report = lab.do("daemon", pid_files=[str(file) for file in files])
    assert (report.ending, report.value) == (Ending.RETURNED, 1.0)
    assert report.num_killed == 3
    assert not [file for file in files if alive(int(file.read_text()))]


def test_daemons_of_a_hanging_child_die_with_it(lab: Any, tmp_path: Path, alive: Alive) -> None:
    pid_file = tmp_path / "pid"
    report = lab.do("daemon_and_hang", pid_files=[str(pid_file)], wall_s=1.0)
    assert report.ending is Ending.TIMEOUT
    assert report.num_killed == 1, "the agent itself is not counted"
    assert not alive(int(pid_file.read_text()))


def test_a_child_that_ignores_every_signal_dies(lab: Any, tmp_path: Path) -> None:
    report = lab.do("hang_deaf", ready=str(tmp_path / "ready"), wall_s=0.5)
    assert (report.ending, report.signal) == (Ending.TIMEOUT, signal.SIGKILL)


def test_a_process_that_keeps_the_pipes_open_does_not_hang_the_run(lab: Any) -> None:
    report = lab.do("leave_pipes_open", wall_s=20)
    assert (report.ending, report.value) == (Ending.RETURNED, 1.0)
    assert report.num_killed == 2
    assert report.wall_s < 10


def test_children_left_running_are_killed_and_counted(lab: Any) -> None:
    report = lab.do("fork_children", count=20)
    assert (report.ending, report.num_killed) == (Ending.RETURNED, 20)


def test_killing_the_init_only_ends_the_child(lab: Any, tmp_path: Path, alive: Alive) -> None:
    pid_file = tmp_path / "pid"
    report = lab.do("kill_init", pid_file=str(pid_file))
    assert report.ending is Ending.SIGNALED
    assert "init was killed" in report.error
    assert report.num_killed >= 2, "the agent and its daemon"
    assert not alive(int(pid_file.read_text()))
    assert lab.do("number").ending is Ending.RETURNED, "the zygote goes on"
    assert [path.name for path in lab.folder.glob("*/*")] == ["zygote"], "no folder is left"


def test_killing_the_zygote_loses_the_run_and_leaves_nothing(lab: Any) -> None:
    async def go() -> tuple[ChildReport, list[psutil.Process]]:
        zygote = await lab.zygote()
        running = psutil.Process(zygote.guardian_pid).children(recursive=True)
        report = await zygote.run({"do": "kill_zygote"})
        await zygote.gone()
        assert not zygote.is_alive
        return report, running

    report, running = lab.run(go())
    assert report.ending is Ending.LOST
    assert not [process for process in running if process.is_running()]
    assert lab.do("number").ending is Ending.RETURNED, "with a new zygote"


def test_an_init_that_does_not_obey_costs_the_zygote_and_nothing_else(
    lab: Any, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    monkeypatch.setattr(run, "KILL_TIMEOUT_S", 0.2)

    async def go() -> tuple[ChildReport, list[psutil.Process]]:
        zygote = await lab.start("acts:act")
        task = asyncio.ensure_future(zygote.run({"do": "stop_init"}, wall_s=2.0))
        guardian = psutil.Process(zygote.guardian_pid)
        await asyncio.to_thread(
            eventually, lambda: len(guardian.children(recursive=True)) == 3, "all are up"
        )
        family = guardian.children(recursive=True)
        report = await task
        await zygote.gone()
        return report, family

    report, family = lab.run(go())
    assert report.ending is Ending.TIMEOUT
    assert not [process for process in family if process.is_running()]


def test_closing_a_zygote_ends_its_children_and_folders(
    lab: Any, tmp_path: Path, alive: Alive, eventually: Eventually
) -> None:
    pid_file = tmp_path / "pid"

    async def go() -> ChildReport:
        zygote = await lab.start("acts:act")
        act = {"do": "daemon_and_hang", "pid_files": [str(pid_file)]}
        run = asyncio.ensure_future(zygote.run(act))
        await asyncio.to_thread(eventually, pid_file.exists, "the daemon is up")
        await zygote.close()
        await zygote.close()  # a second time does nothing
        return await run

    report = lab.run(go())
    assert report.ending is Ending.LOST
    assert not alive(int(pid_file.read_text()))


def test_an_import_that_hangs_is_ended_with_the_daemons_it_started(
    lab: Any, tmp_path: Path, alive: Alive
) -> None:
    pid_file = tmp_path / "pid"
    for name in ("acts.py", "daemon_import.py"):
        (tmp_path / name).write_text((AGENTS / name).read_text())
    (tmp_path / "daemon_import.txt").write_text(f"{pid_file}\nhang")
    start = lab.start("daemon_import:agent", python_path=[str(tmp_path)], timeout_s=2.0)
    with pytest.raises(ZygoteFailed, match="was not imported within 2 s"):
        lab.run(start)
    assert not alive(int(pid_file.read_text()))


HOST = """
import asyncio, os, sys
from pathlib import Path
from sandbox import SandboxSpec, Zygote
from sandbox.probe import probe

async def main():
    zygote = await Zygote.start(
        SandboxSpec(env={"PATH": os.environ["PATH"]}), probe(), folder=Path(sys.argv[1]) / "zygote",
        target="acts:act", python_path=[sys.argv[2]], timeout_s=30)
    await zygote.run({"do": "daemon_and_hang", "pid_files": [sys.argv[1] + "/pid"]})

asyncio.run(main())
"""


def test_the_death_of_the_host_ends_everything(
    bare_python: str, tmp_path: Path, eventually: Eventually
) -> None:
    root = Path(__file__).parents[2]
    host = subprocess.Popen([bare_python, "-c", HOST, str(tmp_path), str(AGENTS)], cwd=root)
    try:
        eventually((tmp_path / "pid").exists, "the daemon is up")
        family = psutil.Process(host.pid).children(recursive=True)
        daemon = psutil.Process(int((tmp_path / "pid").read_text()))
        assert daemon in family, "still a descendant: its init is a subreaper"
        assert len(family) >= 5, "guardian, zygote, init, agent, daemon"
    finally:
        host.kill()
        host.wait()
    eventually(lambda: not [p for p in family if p.is_running()], "all are gone", timeout_s=5)


def test_a_private_folder_full_of_traps_is_removed(lab: Any, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("keep me")
    report = lab.do("litter", precious=str(precious))
    assert report.ending is Ending.RETURNED
    assert (precious / "file").read_text() == "keep me"
    assert [path.name for path in lab.folder.glob("*/*")] == ["zygote"]


def test_a_link_in_the_place_of_the_folder_is_not_followed(lab: Any, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("keep me")
    assert lab.do("replace_folder", precious=str(precious)).ending is Ending.RETURNED
    assert (precious / "file").read_text() == "keep me"


def test_remove_tree_of_nothing_and_of_an_untouched_folder(tmp_path: Path) -> None:
    remove_tree(str(tmp_path / "absent"))
    make_private(str(tmp_path / "private"))
    assert sorted(path.name for path in (tmp_path / "private").iterdir()) == sorted(PARTS)
    remove_tree(str(tmp_path / "private"))
    assert list(tmp_path.iterdir()) == []
