"""A zygote that is renewed: no child is lost, none waits for it, and nothing is left of the old."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sandbox import ChildReport, RenewedZygote, Zygote, ZygoteFailed


class Line:
    """Zygotes of `lab`, whose start can be held up or made to fail."""

    def __init__(self, lab: Any) -> None:
        self.lab = lab
        self.made: list[Zygote] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.target = "acts:act"

    async def start(self) -> Zygote:
        await self.gate.wait()
        zygote: Zygote = await self.lab.start(self.target)
        self.made.append(zygote)
        return zygote


async def run(renewed: RenewedZygote, **data: Any) -> tuple[Zygote, ChildReport]:
    async with renewed.lend() as zygote:
        return zygote, await zygote.run(data, wall_s=30.0)


def test_children_begin_in_the_next_while_the_last_go_on(lab: Any) -> None:
    async def go() -> None:
        line = Line(lab)
        renewed = RenewedZygote(line.start, renew_after=2)
        first, _ = await run(renewed, do="say", value=1)
        line.gate.clear()
        long = asyncio.ensure_future(run(renewed, do="hang"))
        await asyncio.sleep(0)
        assert renewed.is_starting
        # The next one is not there yet: nobody waits for it.
        assert (await run(renewed, do="say", value=2))[0] is first
        line.gate.set()
        await renewed.started()
        second, report = await run(renewed, do="say", value=3)
        assert second is not first and report.value == 3
        assert first.is_alive and not long.done(), "it has a child"
        assert renewed.pids >= first.pids | second.pids
        long.cancel()
        await asyncio.gather(long, return_exceptions=True)
        await first.gone()
        assert second.is_alive and renewed.num_renewed == 1
        await renewed.close()
        assert not second.is_alive

    lab.run(go())


def test_one_that_died_is_replaced_and_one_start_serves_all(lab: Any) -> None:
    async def go() -> None:
        line = Line(lab)
        renewed = RenewedZygote(line.start, renew_after=100)
        runs = await asyncio.gather(*(run(renewed, do="say", value=n) for n in range(5)))
        assert [report.value for _, report in runs] == [0, 1, 2, 3, 4]
        assert len(line.made) == 1
        await line.made[0].close()
        assert not renewed.is_alive
        assert (await run(renewed, do="say", value=7))[1].value == 7
        assert (len(line.made), renewed.num_renewed) == (2, 0)
        await renewed.close()

    lab.run(go())


def test_where_the_next_cannot_start_the_last_goes_on(
    lab: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def go() -> None:
        line = Line(lab)
        renewed = RenewedZygote(line.start, renew_after=1, label="mine")
        first = await renewed.warm()
        line.target = "acts:there_is_none"
        for value in range(3):
            zygote, report = await run(renewed, do="say", value=value)
            assert zygote is first and report.value == value
            await renewed.started()
        assert "mine: goes on in its old zygote" in caplog.text
        await renewed.close()
        broken = RenewedZygote(line.start, renew_after=1)
        with pytest.raises(ZygoteFailed, match="there_is_none"):
            await run(broken, do="say", value=1)
        await broken.close()

    lab.run(go())


def test_closing_while_one_is_started(lab: Any) -> None:
    async def go() -> None:
        line = Line(lab)
        renewed = RenewedZygote(line.start, renew_after=1)
        line.gate.clear()
        warming = asyncio.ensure_future(renewed.warm())
        await asyncio.sleep(0)
        await renewed.close()
        with pytest.raises(asyncio.CancelledError):
            await warming
        assert line.made == []

    lab.run(go())
