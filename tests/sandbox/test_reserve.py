"""Children that stand ready, and the listeners that they bring."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from sandbox import ChildReport, Ending

Below = Callable[..., list[psutil.Process]]
Eventually = Callable[..., None]


@contextlib.asynccontextmanager
async def reserved(lab: Any, below: Below, eventually: Eventually) -> AsyncIterator[Any]:
    zygote = await lab.start("acts:act", reserve=2)
    try:
        await stands_ready(zygote, 2, below, eventually)
        yield zygote
    finally:
        await zygote.close()


async def stands_ready(
    zygote: Any, num: int, below: Below, eventually: Eventually, name: str = "sandbox-child"
) -> set[int]:
    """The process ids of the agents' processes, or of others, once there are `num` of them."""

    def pids() -> set[int]:
        return {process.pid for process in below(zygote.guardian_pid, name)}

    await asyncio.to_thread(eventually, lambda: len(pids()) == num, f"{num} children are there")
    return pids()


def test_a_run_takes_one_that_stands_ready_and_another_takes_its_place(
    lab: Any, below: Below, eventually: Eventually
) -> None:
    async def go() -> None:
        async with reserved(lab, below, eventually) as zygote:
            before = await stands_ready(zygote, 2, below, eventually)
            task = asyncio.ensure_future(zygote.run({"do": "hang"}, wall_s=60.0))
            during = await stands_ready(zygote, 3, below, eventually)
            assert before < during, "none was made for it but the one that takes its place"
            task.cancel()
            await asyncio.wait({task})
            after = await stands_ready(zygote, 2, below, eventually)
            assert len(before - after) == 1, "the run was in one of those"
            assert after < during

    lab.run(go())


def test_those_that_stand_ready_know_of_no_run_and_their_time_does_not_count(
    lab: Any, below: Below, eventually: Eventually
) -> None:
    async def go() -> list[ChildReport]:
        async with reserved(lab, below, eventually) as zygote:
            runs = [
                zygote.run({"do": "surroundings"}, env={"OPENAI_API_KEY": f"key-{number}"})
                for number in range(5)
            ]
            return list(await asyncio.gather(*runs))

    reports = lab.run(go())
    assert {report.ending for report in reports} == {Ending.RETURNED}
    keys = [report.value["environ"]["OPENAI_API_KEY"] for report in reports]
    assert keys == [f"key-{number}" for number in range(5)]
    assert len({report.value["random"] for report in reports}) == 5


def test_one_that_died_while_it_stood_is_not_taken(
    lab: Any, below: Below, eventually: Eventually
) -> None:
    async def go() -> ChildReport:
        async with reserved(lab, below, eventually) as zygote:
            for init in await stands_ready(zygote, 2, below, eventually, "sandbox-init"):
                os.kill(init, signal.SIGKILL)
            await stands_ready(zygote, 0, below, eventually)
            report: ChildReport = await zygote.run({"do": "number"})
            await stands_ready(zygote, 2, below, eventually)  # it is filled again
            return report

    report = lab.run(go())
    assert (report.ending, report.value) == (Ending.RETURNED, 0.25)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def test_closing_leaves_nothing_of_the_reserve(
    lab: Any, below: Below, eventually: Eventually
) -> None:
    async def go() -> list[psutil.Process]:
        async with reserved(lab, below, eventually) as zygote:
            family = below(zygote.guardian_pid)
            # (keeper,) zygote, and an init and an agent of each
            assert len(family) == {"process": 5, "namespaces": 6}[lab.tier] + lab.num_outer
            return family

    lab.do("number")  # what is opened once is open
    before = open_descriptors()
    folders = sorted(lab.folder.iterdir())
    family = lab.run(go())
    assert not [process for process in family if process.is_running()]
    assert sorted(lab.folder.iterdir()) == folders
    eventually(lambda: open_descriptors() <= before, "all descriptors are closed")


@pytest.mark.parametrize("num_rounds", range(3))
def test_closing_while_the_reserve_is_filled(
    lab: Any, eventually: Eventually, num_rounds: int
) -> None:
    """`num_rounds`: of the event loop, until it is closed."""

    async def go() -> Any:
        zygote = await lab.start("acts:act", reserve=20)
        for _ in range(num_rounds):
            await asyncio.sleep(0)
        await zygote.close()
        return zygote

    lab.do("number")  # what is opened once is open
    before = open_descriptors()
    zygote = lab.run(go())
    assert not zygote.is_alive
    assert not psutil.pid_exists(zygote.guardian_pid)
    eventually(lambda: open_descriptors() <= before, "all descriptors are closed")


def test_each_child_comes_by_a_listener_of_its_own(
    lab: Any, below: Below, eventually: Eventually, door: Any
) -> None:
    """So that who it is needs no key: two at a time, on the same port, one of them in reserve."""
    if lab.tier == "process":
        pytest.skip("children of this tier share the network of this machine")

    async def go() -> list[ChildReport]:
        doors = []

        async def one(name: str, zygote: Any, port: int) -> ChildReport:
            async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                said = (await reader.readline()).decode().strip()
                writer.write(f"{name} heard {said}".encode())
                writer.close()

            async def on_listener(fd: int) -> None:
                await opened.on_listener(fd)

            async with door(lab.tier, answer) as opened:
                doors.append(opened)
                act = {"do": "connect", "port": port, "say": f"{name}'s child"}
                report: ChildReport = await zygote.run(act, on_listener=on_listener)
                return report

        async def silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        async with door(lab.tier, silent) as host:  # checks that nobody comes to its `host`
            zygote = await lab.start("acts:act", port=host.port, reserve=1)
            try:
                runs = (one(name, zygote, host.port) for name in ("left", "right", "third"))
                return list(await asyncio.gather(*runs))
            finally:
                await zygote.close()

    reports = lab.run(go())
    assert [report.value for report in reports] == [
        f"{name} heard {name}'s child" for name in ("left", "right", "third")
    ]


def test_a_tier_without_listeners_hands_out_none(lab: Any) -> None:
    handed: list[int] = []

    async def note(fd: int) -> None:
        handed.append(fd)

    async def go() -> tuple[ChildReport, ChildReport]:
        with_port = await lab.start("acts:act", port=8080)
        without = await lab.zygote()
        try:
            first = await with_port.run({"do": "number"}, on_listener=note)
            return first, await without.run({"do": "number"}, on_listener=note)
        finally:
            await with_port.close()

    for report in lab.run(go()):
        assert report.ending is Ending.RETURNED
    assert len(handed) == {"process": 0, "namespaces": 1}[lab.tier]
    for fd in handed:
        assert not Path(f"/proc/self/fd/{fd}").exists(), "closed with the run"


def test_a_failing_taker_of_the_listener_ends_the_child(
    lab: Any, below: Below, eventually: Eventually
) -> None:
    if lab.tier == "process":
        pytest.skip("this tier has no listeners")

    async def refuse(fd: int) -> None:
        raise RuntimeError("no room")

    async def go() -> None:
        zygote = await lab.start("acts:act", port=8080)
        try:
            with pytest.raises(RuntimeError, match="no room"):
                await zygote.run({"do": "hang"}, on_listener=refuse)
            await stands_ready(zygote, 0, below, eventually)
        finally:
            await zygote.close()

    lab.run(go())


def test_nothing_is_left_of_runs_that_were_given_up_before_they_were_ordered(
    lab: Any, below: Below, eventually: Eventually
) -> None:
    """More at once than a zygote's connection takes, while nobody reads it."""

    async def go() -> None:
        zygote = await lab.start("acts:act")
        try:
            assert (await zygote.run({"do": "number"})).ending is Ending.RETURNED
            name = "sandbox-zygote" if lab.tier == "process" else "sandbox-keeper"
            (reading,) = below(zygote.guardian_pid, name)
            before = open_descriptors()
            reading.suspend()
            tasks = [asyncio.ensure_future(zygote.run({"do": "number"})) for _ in range(400)]
            await asyncio.to_thread(eventually, zygote._sending.locked, "an order has to wait")
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            reading.resume()
            assert all(isinstance(end, asyncio.CancelledError) for end in ended)
            assert open_descriptors() == before
            assert (await zygote.run({"do": "number"})).ending is Ending.RETURNED
        finally:
            await zygote.close()

    lab.run(go())
