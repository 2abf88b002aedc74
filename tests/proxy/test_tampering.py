"""What looks like cheating is counted for the run and for who did it, and has no effect."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from areal_sub.proxy import sessions
from areal_sub.proxy.sessions import FinishedKeys
from areal_sub.proxy.tampering import MAX_EXAMPLE_CHARS, MAX_EXAMPLES, Sign, Tampering


async def calls(url: str, key: str, *paths: str) -> list[int]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(headers=headers) as client:
        return [(await client.get(url + path)).status_code for path in paths]


def test_routes_that_are_not_there_count_for_who_asked(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        rollout, bystander = await proxy.open(), await proxy.open()
        paths = ["/rl/set_reward", "/v1/end-rollout/", "/v1/nothing", "/v1/models"]
        assert await calls(proxy.url, rollout.key, *paths) == [404, 404, 404, 200]
        assert await calls(proxy.url, "", f"/k/{rollout.key}/stats") == [404]
        assert await calls(proxy.url, "no key", "/v1/nothing") == [404]
        for each in (rollout, bystander):
            await each.end(outcome="exception", reward=None)
        one, other = [record for record in proxy.records() if record.KIND == "end"]
        assert one.tampering == {"control_route": 3, "unknown_route": 1}
        assert other.tampering == {}
        told = (await proxy.stats())["tampering"]
        assert told["counts"] == {"control_route": 3, "unknown_route": 2}
        assert f"{rollout.rollout_id}: GET /k/.../stats" in told["examples"]["control_route"]
        assert "somebody: GET /v1/nothing" in told["examples"]["unknown_route"]
        assert rollout.key not in str(told)

    proxied(work)


def test_keys_where_they_do_not_belong(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        thief, victim, gone = [await proxy.open(rollout_id=name) for name in ("t", "v", "g")]
        await gone.end(outcome="exception", reward=None)
        own = f"{proxy.url}/k/{thief.key}"
        assert await calls(own, victim.key, "/v1/models") == [401]
        assert await calls(own, gone.key, "/v1/models") == [401]
        assert await calls(proxy.url, gone.key, "/v1/models") == [401]
        assert await calls(proxy.url, "guessed", "/v1/models") == [401]
        assert await calls(proxy.url, "", "/v1/models") == [401]
        await thief.end(outcome="exception", reward=None)
        assert proxy.records()[-1].tampering == {"foreign_key": 1, "finished_key": 1}
        counts = (await proxy.stats())["tampering"]["counts"]
        assert counts == dict.fromkeys(
            ["foreign_key", "finished_key", "call_after_end", "unknown_key"], 1
        )

    proxied(work)


def test_who_was_cut_off_in_the_middle_has_done_nothing(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        cut_off, ended = await proxy.open(), await proxy.open()
        await cut_off.end(outcome="cancelled", reward=None)
        assert await calls(proxy.url, cut_off.key, "/v1/models") == [401]
        assert (await proxy.stats())["tampering"]["counts"] == {}
        await ended.end(outcome="timeout", reward=None)
        assert await calls(proxy.url, ended.key, "/v1/models") == [401]
        assert (await proxy.stats())["tampering"]["counts"] == {"call_after_end": 1}

    proxied(work)


@pytest.mark.parametrize(
    ("claim", "kept", "differs"),
    [(None, None, 0), (0.5, 0.5, 0), (1.0, 1.0, 1), ({"turn": 0.5, "x" * 999: 0.0}, "turn", 0)],
)
def test_a_claim_is_kept_beside_the_grade(
    proxied: Any, claim: Any, kept: Any, differs: int
) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        async with rollout.client() as client:
            messages: Any = [{"role": "user", "content": "?"}]
            turn = await client.chat.completions.create(model="m", messages=messages)
        claimed = claim
        if isinstance(claim, dict):
            claimed = {turn.id if id == "turn" else id: value for id, value in claim.items()}
        await rollout.end(reward=0.5, claimed_reward=claimed)
        end = proxy.records()[-1]
        assert end.reward == 0.5
        assert end.claimed_reward == ({turn.id: 0.5} if kept == "turn" else kept)
        assert end.tampering == ({"claim_differs": 1} if differs else {})

    proxied(work)


def test_examples_are_few_short_and_printable() -> None:
    tampering = Tampering()
    for number in range(100):
        tampering.add(Sign.UNKNOWN_ROUTE, f"r{number}", "GET /\x1b[2J\u202e\n" + "x" * 9999)
    assert tampering.counts == {"unknown_route": 100}
    (examples,) = tampering.examples.values()
    assert len(examples) == MAX_EXAMPLES
    assert all(len(each) <= MAX_EXAMPLE_CHARS and each.isprintable() for each in examples)


def test_the_latest_finished_keys_are_known_in_memory_that_does_not_grow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sessions, "MAX_FINISHED_KEYS", 4)
    finished = FinishedKeys()
    assert "" not in finished and "never" not in finished
    for number in range(6):
        finished.add(f"key {number}")
    assert [f"key {number}" in finished for number in range(6)] == [False] * 2 + [True] * 4


def test_only_so_many_keys_of_a_call_are_looked_at(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        others = "&".join(f"key=guess{number}" for number in range(60))
        assert await calls(proxy.url, "", f"/v1/models?key={rollout.key}&{others}") == [200]
        assert await calls(proxy.url, "", f"/v1/models?{others}&key={rollout.key}") == [401]

    proxied(work)
