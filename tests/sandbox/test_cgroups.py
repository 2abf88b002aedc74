"""Groups: what the kernel bounds and counts of all processes of a child, and that none is left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from sandbox import ChildReport, Ending, Limits, PlanError, SandboxSpec, handle
from sandbox.cgroups import MOVED, NoGroups, Place, find, places
from sandbox.plan import plan
from sandbox.probe import Probe

AGENTS = Path(__file__).parent / "agents"
MIB = 2**20
LIMITS = Limits(total_memory_bytes=96 * MIB, total_cpu_s=1)
Eventually = Callable[..., None]


@pytest.fixture
def place(probed: Probe) -> Place:
    if reason := probed.layers["cgroups"]:
        pytest.skip(f"this machine gives no cgroups: {reason}")
    return find()


def left(place: Place, pid: int | None = None) -> list[str]:
    """The groups that zygotes of a process have, in all trees."""
    name = f"sandbox-{pid or os.getpid()}-*"
    return [str(path) for folder in place.folders for path in Path(folder).glob(name)]


def children(place: Place) -> list[str]:
    return [str(path) for top in left(place) for path in Path(top).glob("child-*")]


def greedy(lab: Any, work: Callable[[Any], Awaitable[Any]], **options: Any) -> Any:
    options.setdefault("limits", LIMITS)
    options.setdefault("target", "greedy:agent")

    async def go() -> Any:
        zygote = await lab.start(options.pop("target"), **options)
        try:
            return await work(zygote)
        finally:
            await zygote.close()

    return lab.run(go())


V1 = """\
9:name=systemd:/user.slice
8:pids:/user.slice/my scope
4:memory:/docker/1234
2:cpu,cpuacct:/
0::/
"""
MOUNTS_V1 = """\
22 1 0:20 / / rw,relatime - ext4 /dev/root rw
30 22 0:26 / /sys/fs/cgroup/systemd rw,nosuid shared:9 - cgroup cgroup rw,name=systemd
31 22 0:27 / /sys/fs/cgroup/pids rw shared:10 - cgroup cgroup rw,pids
32 22 0:28 /docker/1234 /sys/fs/cgroup/memory\\040of\\040mine rw - cgroup cgroup rw,memory
33 22 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
"""
MOUNT_V2 = "34 22 0:30 {} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


def test_where_groups_may_be_made_is_read_from_what_the_kernel_tells() -> None:
    v1 = Place(
        1,
        (
            "/sys/fs/cgroup/memory of mine",
            "/sys/fs/cgroup/pids/user.slice/my scope",
            "/sys/fs/cgroup/cpu,cpuacct",
        ),
    )
    assert places(V1, MOUNTS_V1) == [v1]
    both = places(V1, MOUNTS_V1 + MOUNT_V2.format("/"))
    assert both == [Place(2, ("/sys/fs/cgroup",), is_top=True), v1]
    scope = "/user.slice/user-1.slice/user@1.service/app.slice/run-7.scope"
    own = Place(2, (f"/sys/fs/cgroup{scope}",))
    assert places(f"0::{scope}\n", MOUNT_V2.format("/")) == [own]
    assert places(f"0::{scope}/{MOVED}\n", MOUNT_V2.format("/")) == [own], "moved before"
    assert places(f"0::{scope}\n", MOUNT_V2.format(scope)) == [
        Place(2, ("/sys/fs/cgroup",), is_top=True)
    ]
    assert places("0::/\n", "") == []
    assert places(V1.replace("memory", "blkio"), MOUNTS_V1) == []


def test_memory_is_bounded_in_sum(lab: Any, place: Place) -> None:
    """Also where the agent itself survives it, and long before anybody polls."""

    async def work(zygote: Any) -> list[ChildReport]:
        acts = [{"mib": 40, "num": 4, "s": 0.1}, {"mib": 40, "num": 4, "s": 60}]
        few = {"mib": 30, "num": 2, "s": 0.1}
        return [await zygote.run({"do": "hold", **act}, wall_s=30) for act in (*acts, few)]

    *over, within = greedy(lab, work, limits=Limits(total_memory_bytes=96 * MIB))
    for report in over:
        assert report.ending is Ending.MEMORY_LIMIT, report
        assert report.error == f"its processes used more than {96 * MIB} bytes of memory together"
        assert 80 * MIB < report.peak_memory_bytes <= 96 * MIB
        assert report.wall_s < 20
    assert (within.ending, within.value) == (Ending.RETURNED, [0, 0]), within
    assert 30 * MIB < within.peak_memory_bytes < 96 * MIB, "at least the part of one"


def test_processes_are_bounded_in_number(lab: Any, place: Place) -> None:
    async def work(zygote: Any) -> list[ChildReport]:
        return [await zygote.run({"do": "fork"}, wall_s=30) for _ in range(2)]

    for report in greedy(lab, work, limits=Limits(processes=32)):
        assert (report.ending, report.value) == (Ending.RETURNED, "EAGAIN")
        assert report.num_killed <= 32
        if lab.tier == "process":  # in the other one, rlimits count the init, too
            assert report.num_killed == 31


def test_cpu_time_counts_of_processes_that_nobody_waits_for(lab: Any, place: Place) -> None:
    async def work(zygote: Any) -> list[ChildReport]:
        acts = [{"do": "burn_unwaited", "num": num} for num in (3, 6, 1000)]
        return [await zygote.run(act, wall_s=30) for act in acts]

    within, over, far_over = greedy(lab, work)
    assert (within.ending, within.measured_by) == (Ending.RETURNED, "cgroup")
    assert 0.6 <= within.cpu_s <= 1.0
    for report in (over, far_over):
        assert report.ending is Ending.CPU_LIMIT
        assert report.error == "its processes used more than 1 s of CPU together"
        assert 1.0 < report.cpu_s < 4.0


def test_each_child_has_a_group_of_its_own_that_goes_with_it(
    lab: Any, place: Place, eventually: Eventually
) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))

    async def work(zygote: Any) -> None:
        runs = [asyncio.ensure_future(zygote.run({"do": "wait"}, wall_s=60)) for _ in range(5)]
        await asyncio.to_thread(
            eventually, lambda: len(children(place)) == 5 * len(place.folders), "all have one"
        )
        for run in runs:
            run.cancel()
        await asyncio.wait(runs)
        for _ in range(20):
            report = await zygote.run({"do": "nothing"})
            assert (report.ending, report.measured_by) == (Ending.RETURNED, "cgroup"), report
            assert 0 < report.cpu_s < 1, "its own time, not that of those before it"
        await asyncio.to_thread(eventually, lambda: not children(place), "their groups are gone")
        assert len(left(place)) == len(place.folders)

    greedy(lab, work)
    assert left(place) == []
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 8


@pytest.mark.parametrize("victim", ["sandbox-guard", "sandbox-zygote"])
def test_no_group_is_left_where_a_process_above_is_killed(
    lab: Any, place: Place, victim: str, below: Any, eventually: Eventually
) -> None:
    async def work(zygote: Any) -> None:
        report = asyncio.ensure_future(zygote.run({"do": "wait"}, wall_s=60))
        up = partial(below, zygote.guardian_pid, "sandbox-child")
        await asyncio.to_thread(eventually, up, "the child is up")
        assert children(place)
        guardian = psutil.Process(zygote.guardian_pid)
        (killed,) = [one for one in (guardian, *below(guardian.pid)) if one.name() == victim]
        killed.kill()
        assert (await report).ending is not Ending.RETURNED
        await zygote.gone()

    greedy(lab, work)
    assert left(place) == []


HOST = """
import asyncio, os, sys
from pathlib import Path
from sandbox import SandboxSpec, Zygote
from sandbox.probe import probe

async def main():
    zygote = await Zygote.start(
        SandboxSpec(tier=sys.argv[3], cgroups="require", env={"PATH": os.environ["PATH"]}), probe(),
        folder=Path(sys.argv[1]) / "zygote", target="greedy:agent", python_path=[sys.argv[2]],
        timeout_s=30)
    print(zygote.guardian_pid, flush=True)
    await zygote.run({"do": "wait"})

asyncio.run(main())
"""


@pytest.mark.parametrize("with_guardian", [False, True])
@pytest.mark.parametrize("tier", ["process", "namespaces"])
def test_no_group_is_left_where_the_caller_is_killed(
    bare_python: str,
    tier: str,
    with_guardian: bool,
    tmp_path: Path,
    place: Place,
    below: Any,
    eventually: Eventually,
) -> None:
    """Nor where its guardian is as well: then the next caller removes them."""
    root = Path(__file__).parents[2]
    arguments = [bare_python, "-c", HOST, str(tmp_path), str(AGENTS), tier]
    host = subprocess.Popen(arguments, cwd=root, stdout=subprocess.PIPE)
    assert host.stdout is not None
    try:
        guardian = int(host.stdout.readline())
        eventually(lambda: below(host.pid, "sandbox-child"), "the child is up", timeout_s=30)
        family = below(host.pid)
        assert left(place, host.pid)
        if with_guardian:
            os.kill(host.pid, signal.SIGSTOP)  # or it would remove them
            os.kill(guardian, signal.SIGKILL)
    finally:
        host.kill()
        host.wait()
        host.stdout.close()
    eventually(lambda: not [one for one in family if one.is_running()], "all are gone")
    if with_guardian:
        arguments[3] = str(tmp_path / "next")
        following = subprocess.Popen(arguments, cwd=root, stdout=subprocess.PIPE)
        assert following.stdout is not None
        try:
            assert following.stdout.readline().strip(), "the next one is up"
            assert left(place, following.pid)
        finally:
            following.kill()
            following.wait()
            following.stdout.close()
        eventually(lambda: not left(place, following.pid), "its guardian removes its own")
    eventually(lambda: not left(place, host.pid), "the groups are gone")


def test_a_zygote_that_keeps_its_children_out_of_their_groups_is_bounded_by_its_own(
    lab: Any, place: Place
) -> None:
    """In sum it may have what one process and one child may."""
    limits = Limits(memory_bytes=512 * MIB, total_memory_bytes=64 * MIB)

    async def work(zygote: Any) -> list[ChildReport]:
        acts = [{"mib": 50, "num": 4, "s": 0.1}, {"mib": 200, "num": 4, "s": 3}]
        return [await zygote.run({"do": "hold", **act}, wall_s=30) for act in acts]

    some, more = greedy(lab, work, target="keeps_children:agent", limits=limits)
    assert some.value == [0] * 4, "more than its own limit, and not more than the zygote's"
    # Whom the kernel kills is its choice: one of the four, the zygote, or (v2) all in the group.
    if more.ending is Ending.RETURNED:
        assert -signal.SIGKILL in more.value
    else:
        assert more.ending in (Ending.LOST, Ending.SIGNALED, Ending.SETUP_FAILED), more


def test_a_zygote_that_puts_others_into_a_childs_group_is_lost(
    lab: Any, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handle, "REMOVE_TIMEOUT_S", 0.2)

    async def work(zygote: Any) -> ChildReport:
        report: ChildReport = await zygote.run({"do": "nothing"}, wall_s=30)
        await asyncio.wait_for(zygote.gone(), 20)
        return report

    assert greedy(lab, work, target="strays:agent").ending is Ending.RETURNED
    assert left(place) == []


def test_where_a_group_cannot_be_made_nothing_is_run(
    lab: Any, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(zygote: Any) -> ChildReport:
        os.mkdir(f"{left(place)[0]}/child-1")  # noqa: PTH102 (in its way)
        report: ChildReport = await zygote.run({"do": "nothing"})
        assert (await zygote.run({"do": "nothing"})).ending is Ending.RETURNED
        return report

    report = greedy(lab, work)
    assert report.ending is Ending.SETUP_FAILED
    assert "step 'cgroups' failed: no group can be made" in report.error

    def refuse() -> Place:
        raise NoGroups("not any more")

    monkeypatch.setattr(handle, "find", refuse)
    before = set(lab.folder.glob("zygote-*"))  # what is closed may still be on its way out
    with pytest.raises(PlanError, match="cgroups: no group can be made: not any more"):
        greedy(lab, work)
    assert set(lab.folder.glob("zygote-*")) <= before, "nothing is left of it"


def test_without_groups_all_goes_on_and_the_report_says_so(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(zygote: Any) -> list[ChildReport]:
        acts = [{"do": "nothing"}, {"do": "hold", "mib": 40, "num": 4, "s": 3}]
        return [await zygote.run(act, wall_s=30) for act in acts]

    nothing, hold = greedy(lab, work, cgroups="off")
    assert (nothing.ending, nothing.measured_by) == (Ending.RETURNED, "processes")
    assert nothing.peak_memory_bytes == 0
    assert nothing.cpu_s > 0
    if lab.tier == "namespaces":  # polled
        assert hold.ending is Ending.MEMORY_LIMIT
    else:
        assert hold.value == [0] * 4
    assert "cgroups" not in str(plan(SandboxSpec(tier=lab.tier, cgroups="off"), lab.probed)).split()
