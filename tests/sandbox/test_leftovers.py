"""No process and no file of a child outlives it, whatever it does to the processes above it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from sandbox import ChildReport, Ending, ZygoteFailed, run
from sandbox.folders import PARTS, make_private, remove_tree
from sandbox.layers import landlock
from sandbox.probe import Probe

AGENTS = Path(__file__).parent / "agents"
Below = Callable[..., list[psutil.Process]]
Eventually = Callable[..., None]


def test_daemons_are_dead_when_the_run_returns(lab: Any, daemons: Any) -> None:
    report = lab.do("daemon", name=daemons.name, count=3)
    assert (report.ending, report.value) == (Ending.RETURNED, 1.0)
    assert report.num_killed == 3
    assert daemons.pids() == []


def test_daemons_of_a_hanging_child_die_with_it(lab: Any, daemons: Any) -> None:
    report = lab.do("daemon_and_hang", name=daemons.name, wall_s=1.0)
    assert (report.ending, report.stdout_tail) == (Ending.TIMEOUT, "about to hang\n")
    assert report.num_killed == 1, "the agent itself is not counted"
    assert daemons.pids() == []


def test_a_child_that_ignores_every_signal_dies(lab: Any) -> None:
    report = lab.do("hang_deaf", wall_s=0.5)
    assert (report.ending, report.signal) == (Ending.TIMEOUT, signal.SIGKILL)
    assert report.stdout_tail == "deaf\n"


def test_a_process_that_keeps_the_pipes_open_does_not_hang_the_run(lab: Any) -> None:
    report = lab.do("leave_pipes_open", wall_s=20)
    assert (report.ending, report.value) == (Ending.RETURNED, 1.0)
    assert report.num_killed == 2
    assert report.wall_s < 10


def test_children_left_running_are_killed_and_counted(lab: Any) -> None:
    report = lab.do("fork_children", count=20)
    assert (report.ending, report.num_killed) == (Ending.RETURNED, 20)


def test_a_child_can_signal_nobody_but_its_own(lab: Any) -> None:
    if lab.tier == "process" and lab.probed.landlock_abi < landlock.SCOPE_ABI:
        pytest.skip("signals are confined from Landlock ABI 6 (Linux 6.12) on")
    report = lab.do("signal_others", pid=os.getpid())
    refused = "EPERM" if lab.tier == "process" else "ESRCH"  # there: nobody else is to be seen
    assert report.value == {"init": "EPERM", "test": refused, "reached": []}


async def hanging(zygote: Any, daemons: Any, eventually: Eventually) -> asyncio.Task[ChildReport]:
    act = {"do": "daemon_and_hang", "name": daemons.name}
    task: asyncio.Task[ChildReport] = asyncio.ensure_future(zygote.run(act, wall_s=60.0))
    await asyncio.to_thread(eventually, daemons.pids, "the daemon is up")
    assert not task.done()
    return task


def test_the_end_of_an_init_ends_its_child_only(
    lab: Any, daemons: Any, below: Below, eventually: Eventually
) -> None:
    """The agent cannot reach it, but who runs out of memory may lose any process."""

    async def go() -> tuple[ChildReport, list[int]]:
        zygote = await lab.zygote()
        task = await hanging(zygote, daemons, eventually)
        (init,) = below(zygote.guardian_pid, "sandbox-init")
        init.kill()
        return await task, daemons.pids()

    report, left = lab.run(go())
    assert (report.ending, report.signal) == (Ending.SIGNALED, signal.SIGKILL)
    assert "init was killed" in report.error
    if lab.tier == "process":  # in a pid namespace it is the kernel that kills, and does not count
        assert report.num_killed >= 2, "the agent and its daemon"
    assert left == []
    assert lab.do("number").ending is Ending.RETURNED, "the zygote goes on"
    assert {path.name for path in lab.folder.glob("*/*")} == {"zygote"}, "no folder is left"


@pytest.mark.parametrize("victim", ["sandbox-zygote", "sandbox-keeper", "sandbox-guard"])
def test_the_end_of_a_process_above_loses_the_run_and_leaves_nothing(
    lab: Any, victim: str, daemons: Any, below: Below, eventually: Eventually
) -> None:
    if lab.tier == "process" and victim == "sandbox-keeper":
        pytest.skip("this tier has no keeper")

    async def go() -> tuple[ChildReport, list[psutil.Process]]:
        zygote = await lab.zygote()
        task = await hanging(zygote, daemons, eventually)
        guardian = psutil.Process(zygote.guardian_pid)
        family = below(guardian.pid)
        (killed,) = [one for one in (guardian, *family) if one.name() == victim]
        killed.kill()
        report = await task
        await zygote.gone()
        assert not zygote.is_alive
        return report, family

    report, family = lab.run(go())
    assert report.ending is Ending.LOST
    # Without the guardian it is the kernel that passes the end on, from parent to child.
    eventually(lambda: not [one for one in family if one.is_running()], "all are gone")
    assert daemons.pids() == []
    assert lab.do("number").ending is Ending.RETURNED, "with a new zygote"


def test_an_init_that_does_not_obey_costs_the_zygote_and_nothing_else(
    lab: Any, monkeypatch: pytest.MonkeyPatch, daemons: Any, below: Below, eventually: Eventually
) -> None:
    monkeypatch.setattr(run, "KILL_TIMEOUT_S", 0.2)

    async def go() -> tuple[ChildReport, list[psutil.Process]]:
        zygote = await lab.start("acts:act")
        act = {"do": "daemon_and_hang", "name": daemons.name}
        task = asyncio.ensure_future(zygote.run(act, wall_s=2.0))
        await asyncio.to_thread(eventually, daemons.pids, "the daemon is up")
        (init,) = below(zygote.guardian_pid, "sandbox-init")
        init.suspend()
        family = below(zygote.guardian_pid)
        report = await task
        await zygote.gone()
        return report, family

    report, family = lab.run(go())
    assert report.ending is Ending.TIMEOUT
    # (keeper,) zygote, init, agent, daemon
    assert len(family) == {"process": 4, "namespaces": 5}[lab.tier] + lab.num_outer
    assert not [process for process in family if process.is_running()]
    assert daemons.pids() == []


def test_closing_a_zygote_ends_its_children_and_folders(
    lab: Any, daemons: Any, eventually: Eventually
) -> None:
    async def go() -> tuple[ChildReport, list[int]]:
        zygote = await lab.start("acts:act")
        task = await hanging(zygote, daemons, eventually)
        await zygote.close()
        left = daemons.pids()
        await zygote.close()  # a second time does nothing
        return await task, left

    report, left = lab.run(go())
    assert report.ending is Ending.LOST
    assert left == []


def test_an_import_that_hangs_is_ended_with_the_daemons_it_started(
    lab: Any, code: Path, daemons: Any
) -> None:
    for name in ("acts.py", "daemon_import.py"):
        (code / name).write_text((AGENTS / name).read_text())
    (code / "daemon_import.txt").write_text(f"{daemons.name}\nhang")

    async def go() -> tuple[BaseException, list[int]]:
        start = lab.start("daemon_import:agent", python_path=[str(code)], timeout_s=5.0)
        task = asyncio.ensure_future(start)
        seen: list[int] = []
        while not task.done():
            seen = seen or daemons.pids()
            await asyncio.wait({task}, timeout=0.05)
        failure = task.exception()
        assert failure is not None
        return failure, seen

    failure, seen = lab.run(go())
    assert isinstance(failure, ZygoteFailed)
    assert "was not imported within 5 s" in str(failure)
    assert seen, "the daemon was up"
    assert daemons.pids() == []


HOST = """
import asyncio, os, sys
from pathlib import Path
from sandbox import SandboxSpec, Zygote
from sandbox.layers import checks
from sandbox.probe import probe

async def main():
    zygote = await Zygote.start(
        SandboxSpec(tier=sys.argv[3], env={"PATH": os.environ["PATH"]}), probe(checks(sys.argv[3])),
        folder=Path(sys.argv[1]) / "zygote", target="acts:act", python_path=[sys.argv[2]],
        timeout_s=30)
    await zygote.run({"do": "daemon_and_hang", "name": sys.argv[4]})

asyncio.run(main())
"""


@pytest.mark.parametrize("tier", ["process", "namespaces", "bwrap"])
def test_the_death_of_the_host_ends_everything(
    bare_python: str,
    probed: Probe,
    tier: str,
    tmp_path: Path,
    daemons: Any,
    below: Below,
    eventually: Eventually,
) -> None:
    if reason := probed.layers.get(tier, ""):
        pytest.skip(f"the tier {tier} is not to be had here: {reason}")
    root = Path(__file__).parents[2]
    arguments = [str(tmp_path), str(AGENTS), tier, daemons.name]
    host = subprocess.Popen([bare_python, "-c", HOST, *arguments], cwd=root)
    try:
        eventually(daemons.pids, "the daemon is up", timeout_s=30)
        # (bwrap,) guardian, (keeper,) zygote, init, agent, daemon; and for a moment who started it
        num = {"process": 5, "namespaces": 6, "bwrap": 7}[tier]
        eventually(lambda: len(below(host.pid)) == num, f"there are {num}")
        family = below(host.pid)
        (daemon,) = daemons.pids()
        assert daemon in [process.pid for process in family], "still a descendant: of its init"
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
    assert {path.name for path in lab.folder.glob("*/*")} == {"zygote"}


def test_the_private_folder_cannot_be_replaced(lab: Any, tmp_path: Path) -> None:
    report = lab.do("replace_folder", precious=str(tmp_path))
    assert report.value == {"process": "EACCES", "namespaces": "EROFS"}[lab.tier]
    assert {path.name for path in lab.folder.glob("*/*")} == {"zygote"}


def test_a_link_in_the_place_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    """Where Landlock does not stop it, or somebody else did it."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("keep me")
    (tmp_path / "private").symlink_to(precious)
    remove_tree(str(tmp_path / "private"))
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    assert (precious / "file").read_text() == "keep me"


def test_links_put_there_meanwhile_are_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a zygote with a hostile import, in the tier `process`: by the time that a folder's turn
    comes, it is a link."""
    precious, folder = tmp_path / "precious", tmp_path / "private"
    (precious / "inner").mkdir(parents=True)
    (precious / "file").write_text("keep me")
    (folder / "turned").mkdir(parents=True)
    scandir, here = os.scandir, threading.get_ident()

    def turned(path: Any) -> Any:
        if threading.get_ident() != here:  # the removal of another test's folder
            return scandir(path)
        listing = list(scandir(path))  # which says of each entry what it was
        if (folder / "turned").is_dir() and not (folder / "turned").is_symlink():
            (folder / "turned").rename(tmp_path / "elsewhere")
            (folder / "turned").symlink_to(precious)
        return contextlib.nullcontext(listing)

    monkeypatch.setattr(os, "scandir", turned)
    with pytest.raises(OSError, match="turned"):
        remove_tree(str(folder))
    monkeypatch.undo()
    assert sorted(path.name for path in precious.iterdir()) == ["file", "inner"]
    remove_tree(str(folder))  # when nobody writes there any more
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "precious"]


def test_remove_tree_of_nothing_and_of_an_untouched_folder(tmp_path: Path) -> None:
    remove_tree(str(tmp_path / "absent"))
    make_private(str(tmp_path / "private"))
    assert sorted(path.name for path in (tmp_path / "private").iterdir()) == sorted(PARTS)
    remove_tree(str(tmp_path / "private"))
    assert list(tmp_path.iterdir()) == []


def test_removing_many_entries_takes_no_memory_for_each(tmp_path: Path) -> None:
    """It is the caller's, in the tier `process`; and a child may leave as many as the disk has."""
    folder = tmp_path / "private"
    (folder / "work").mkdir(parents=True)
    for number in range(2000):
        (folder / "work" / f"file-{number}").touch()
        (folder / f"folder-{number}" / "inner").mkdir(parents=True)
    tracemalloc.start()
    try:
        remove_tree(str(folder))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert not folder.exists()
    assert peak_bytes < 2**18  # of which other threads here have their part


def test_nobody_waits_for_long_removals(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk may take minutes to remove the folders that a child made in seconds."""
    if lab.tier != "process":
        pytest.skip("this tier leaves nothing to remove")
    may_end = threading.Event()

    def remove_slowly(folder: str) -> None:
        may_end.wait(30)
        remove_tree(folder)

    monkeypatch.setattr("sandbox.handle.remove_tree", remove_slowly)
    monkeypatch.setattr("sandbox.handle.CLEANUP_TIMEOUT_S", 0.02)

    async def go() -> list[ChildReport]:
        zygote = await lab.start("acts:act")
        try:
            runs = [
                zygote.run({"do": "leave_file", "end": "return"}, outputs=["left"])
                for _ in range(40)
            ]
            async with asyncio.timeout(60):
                return [await each for each in runs]
        finally:
            may_end.set()
            await zygote.close()

    reports = lab.run(go())
    assert {report.ending for report in reports} == {Ending.RETURNED}
    assert all(report.outputs for report in reports)
    assert not list(lab.folder.glob("*/*/work/left"))
