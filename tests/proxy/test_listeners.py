"""Listeners of children's own networks: the connection says which rollout is calling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

MESSAGES: Any = [{"role": "user", "content": "?"}]


@pytest.mark.parametrize("key", ["its own", "hard-coded"])
def test_a_connection_belongs_to_its_rollout_whatever_the_key(
    proxied: Any, hand_over: Callable[[str], int], key: str
) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says("Hi<|im_end|>")
        mine = await proxy.open()
        url = f"http://127.0.0.1:{hand_over(mine.rollout_id)}"
        api_key = mine.key if key == "its own" else "sk-hard-coded"
        async with mine.client(base_url=f"{url}/v1", api_key=api_key) as client:
            completion = await client.chat.completions.create(model="m", messages=MESSAGES)
        assert [turn.turn_id for turn in mine.turns()] == [completion.id]

    proxied(work)


@pytest.mark.parametrize("where", ["header", "path"])
def test_another_rollouts_key_is_refused_and_counted_for_both(
    proxied: Any, hand_over: Callable[[str], int], where: str
) -> None:
    async def work(proxy: Any) -> None:
        mine, other = await proxy.open(), await proxy.open()
        url = f"http://127.0.0.1:{hand_over(mine.rollout_id)}"
        path = f"/k/{other.key}/v1" if where == "path" else "/v1"
        api_key = mine.key if where == "path" else other.key
        async with mine.client(base_url=url + path, api_key=api_key) as client:
            with pytest.raises(openai.AuthenticationError):
                await client.chat.completions.create(model="m", messages=MESSAGES)
        assert (await proxy.stats())["num_rejected"] == {"foreign_key": 1}
        assert not proxy.engine.sampled
        for rollout in (mine, other):
            await rollout.end(outcome="exception", reward=None)
        ends = [record for record in proxy.records() if record.KIND == "end"]
        assert [end.num_rejected_calls for end in ends] == [1, 1]

    proxied(work)


def test_the_listener_ends_with_its_rollout(proxied: Any, hand_over: Callable[[str], int]) -> None:
    async def work(proxy: Any) -> None:
        mine = await proxy.open()
        url = f"http://127.0.0.1:{hand_over(mine.rollout_id)}"
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"{url}/v1/models")).status_code == 200
            await mine.end(outcome="exception", reward=None)
            # The connection that is there goes on to be refused; a new one finds nobody.
            assert (await client.get(f"{url}/v1/models")).status_code == 401
        async with httpx.AsyncClient() as client:
            with pytest.raises(httpx.ConnectError):
                await client.get(f"{url}/v1/models")

    proxied(work)


def test_a_listener_of_an_unknown_rollout_is_closed(
    proxied: Any, hand_over: Callable[[str], int]
) -> None:
    async def work(proxy: Any) -> None:
        url = f"http://127.0.0.1:{hand_over('nobody')}"
        async with httpx.AsyncClient() as client:
            with pytest.raises((httpx.ConnectError, httpx.ReadError)):
                await client.get(f"{url}/v1/models")
        mine = await proxy.open()  # the proxy goes on
        async with httpx.AsyncClient() as client:
            answer = await client.get(f"http://127.0.0.1:{hand_over(mine.rollout_id)}/v1/models")
        assert answer.status_code == 200

    proxied(work)
