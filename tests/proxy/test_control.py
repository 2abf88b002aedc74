"""The control plane, less what other tests use of it anyway: streams, offsets, misuse."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from areal_sub.errors import RpcError
from areal_sub.records import IntentRecord, decode_record, encode_record, renamed


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


def test_a_rollout_that_was_recorded_elsewhere_is_recorded_whole_or_not_at_all(
    proxied: Any,
) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open(rollout_id="r0")
        async with rollout.client() as client:
            await client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "?"}]
            )
        await rollout.end()
        open_, turn, end = [
            encode_record(renamed(record, rollout_id="copy", group_id="g9"))
            for record in proxy.records()
            if not isinstance(record, IntentRecord)
        ]

        async def imported(*records: bytes) -> None:
            params = {"records": list(records)}
            await proxy.control.call("import_rollout", params, timeout_s=10)

        num = len(proxy.records())
        for part in ((open_, turn), (turn, end), (open_, end), (open_, b"junk", end)):
            with pytest.raises(RpcError):
                await imported(*part)
        assert len(proxy.records()) == num
        await imported(open_, turn, end)
        assert [(r.KIND, r.rollout_id) for r in proxy.records()[num:]] == [
            ("open", "copy"),
            ("turn", "copy"),
            ("end", "copy"),
        ]

    proxied(work)
