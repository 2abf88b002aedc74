"""Waits that end what they began."""

from __future__ import annotations

import asyncio

import pytest

from areal_sub.waits import uninterrupted


def test_cancelled_twice_it_still_ends_and_the_cancellation_comes_after_it() -> None:
    async def main() -> None:
        steps: list[str] = []
        gate = asyncio.Event()

        async def work() -> None:
            await gate.wait()
            steps.append("done")

        async def caller() -> None:
            try:
                await uninterrupted(work())
            finally:
                steps.append("gone")

        task = asyncio.ensure_future(caller())
        for _ in range(2):
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert steps == ["done", "gone"]

    asyncio.run(main())


def test_its_result_and_its_error_are_the_works() -> None:
    async def work(divisor: int) -> float:
        return 1 / divisor

    assert asyncio.run(uninterrupted(work(2))) == 0.5
    with pytest.raises(ZeroDivisionError):
        asyncio.run(uninterrupted(work(0)))
