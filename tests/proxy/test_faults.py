"""By whose fault an agent failed, where its last call says so."""

from __future__ import annotations

import contextlib
from typing import Any

import openai
import pytest

from areal_sub.records import EndRecord, Fault, Outcome

MESSAGES: Any = [{"role": "user", "content": "?"}]


async def ended(proxy: Any, rollout: Any, outcome: str = "exception") -> EndRecord:
    await rollout.end(outcome=outcome, reward=None, error="ValueError: I gave up")
    end = proxy.records()[-1]
    assert isinstance(end, EndRecord) and end.error == "ValueError: I gave up"
    return end


async def call(rollout: Any, **changes: Any) -> None:
    changes = {"messages": MESSAGES, **changes}
    async with rollout.client() as client:
        with contextlib.suppress(openai.APIError):
            await client.chat.completions.create(model="m", **changes)


def test_the_policys_fault_is_told_from_the_agents(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        await call(rollout, messages=[{"role": "user", "content": "x " * 9000}])
        assert (await ended(proxy, rollout)).outcome is Outcome.CONTEXT_LIMIT

        rollout = await proxy.open(max_turns=1)
        await call(rollout)
        await call(rollout)
        assert (await ended(proxy, rollout, "exited")).outcome is Outcome.TURN_LIMIT

        proxy.engine.says("a long answer<|im_end|>")
        rollout = await proxy.open()
        await call(rollout, max_tokens=1)
        assert (await ended(proxy, rollout)).outcome is Outcome.LENGTH_LIMIT
        rollout = await proxy.open()
        await call(rollout, max_tokens=1)
        await call(rollout)  # it got over it
        assert (await ended(proxy, rollout)).outcome is Outcome.EXCEPTION
        rollout = await proxy.open(max_turns=1)
        await call(rollout)
        await call(rollout)
        assert (await ended(proxy, rollout, "timeout")).outcome is Outcome.TIMEOUT

    proxied(work)


@pytest.mark.parametrize("stream", [False, True])
def test_an_agent_that_fails_as_the_engine_did_is_lost(proxied: Any, stream: bool) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        await proxy.engine_server.close()
        await call(rollout, stream=stream)
        assert (await ended(proxy, rollout)).outcome is Outcome.LOST

    proxied(work, request_timeout_s=3.0)


def test_who_has_called_the_model_had_started(proxied: Any) -> None:
    """Else an agent's import could have its rollouts run again, once it has seen how they went."""

    async def work(proxy: Any) -> None:
        for has_called, outcome in ((False, Outcome.START_FAILED), (True, Outcome.EXITED)):
            rollout = await proxy.open()
            if has_called:
                await call(rollout)
            await rollout.end(outcome="start_failed", reward=None, error="no such step")
            end = proxy.records()[-1]
            assert isinstance(end, EndRecord)
            assert end.outcome is outcome
            assert end.error.endswith("no such step")

    proxied(work)


def test_every_outcome_is_somebodys_fault() -> None:
    by_fault = {fault: {o for o in Outcome if o.fault is fault} for fault in Fault}
    assert by_fault[Fault.NONE] == {Outcome.COMPLETED}
    assert by_fault[Fault.INFRASTRUCTURE] == {
        Outcome.LOST, Outcome.START_FAILED, Outcome.GRADER_FAILED, Outcome.CANCELLED,
    }  # fmt: skip
    assert by_fault[Fault.POLICY] == {
        Outcome.CONTEXT_LIMIT, Outcome.TURN_LIMIT, Outcome.LENGTH_LIMIT,
    }  # fmt: skip
