"""The control plane, less what other tests use of it anyway: streams, offsets, misuse."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from areal_sub.errors import RpcError
from areal_sub.records import decode_record


def test_subscribing_from_an_offset_misses_nothing_and_repeats_nothing(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        rollouts = [await proxy.open(rollout_id=f"r{i}") for i in range(3)]
        seen: list[str] = []
        offset = 0

        async def read(count: int) -> None:
            nonlocal offset
            items = proxy.control.stream("subscribe", {"offset": offset})
            async for item in items:
                for raw in item["records"]:
                    record = decode_record(raw)
                    seen.append(f"{record.KIND} {record.rollout_id}")
                offset = item["offset"]
                if len(seen) >= count:
                    break
            await items.aclose()

        await read(3)
        reading = asyncio.ensure_future(read(6))  # waits for what is not there yet
        for rollout in rollouts:
            await rollout.end(outcome="cancelled", reward=None)
        await reading
        assert seen == [f"{kind} r{i}" for kind in ("open", "end") for i in range(3)]
        with pytest.raises(RpcError, match="no offset 999999"):
            await anext(proxy.control.stream("subscribe", {"offset": 999_999}))

    proxied(work)


def test_misuse_is_an_error_that_names_the_rollout(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open(rollout_id="r1")
        with pytest.raises(RpcError, match="r1 is open already"):
            await proxy.open(rollout_id="r1")
        with pytest.raises(RpcError, match="another rollout's"):
            await proxy.open(rollout_id="r2", key=rollout.key)
        await rollout.end(outcome="cancelled")
        with pytest.raises(RpcError, match="r1 is not open"):
            await rollout.end()
        with pytest.raises(RpcError, match="another rollout's"):
            await proxy.open(rollout_id="r3", key=rollout.key)
        assert [record.KIND for record in proxy.records()] == ["open", "end"]

    proxied(work)
