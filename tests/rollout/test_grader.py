"""Graders in a real supervisor: what they see, what they may say, and what becomes of failures."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from areal_sub.config.schema import OpenAIConfig
from areal_sub.errors import WorkflowError
from areal_sub.records import Outcome, RunReport
from areal_sub.rollout.grader import Grader
from areal_sub.rollout.pool import SubprocPool
from areal_sub.rollout.rewards import Verdict
from areal_sub.rpc import Client


def said(turn_id: str, content: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, "turn_id": turn_id}
    return {"prompt": 0, "message": {**message, "finish_reason": "stop"}}


TRANSCRIPT = {
    "prompts": [{"parent_turn_id": None, "messages": [{"role": "user", "content": "6 * 7?"}]}],
    "turns": [said("t1", "41"), said("t2", "42")],
}


def report(result: Any = None, outcome: Outcome = Outcome.COMPLETED) -> RunReport:
    return RunReport(
        rollout_id="r",
        outcome=outcome,
        result=result,
        error="",
        traceback="",
        stdout_tail="said",
        stderr_tail="",
        exit_code=0,
        signal=None,
        wall_s=1.0,
        cpu_s=1.0,
        max_rss_bytes=1,
        outputs={"out/answer": b"\x0042\xff"},
        outputs_refused=[["link", "it is a symbolic link"]],
    )


def with_grader(
    supervisor: Any, reward: str, work: Callable[[Grader], Awaitable[Any]], **config: Any
) -> Any:
    async def go() -> Any:
        client = await Client.connect(supervisor.path, peer="supervisor", timeout_s=30.0)
        try:
            settings = OpenAIConfig(
                reward=reward,
                **{f"reward_{name}": value for name, value in config.items()},
            )
            return await work(Grader(SubprocPool(client), settings))
        finally:
            await client.close()

    return asyncio.run(go())


def grade(
    supervisor: Any, name: str, task: dict[str, Any] | None = None, **config: Any
) -> tuple[Verdict, Grader]:
    async def work(grader: Grader) -> tuple[Verdict, Grader]:
        return await grader.grade(task or {}, TRANSCRIPT, report(0.125)), grader

    verdict: tuple[Verdict, Grader] = with_grader(supervisor, f"graders:{name}", work, **config)
    return verdict


def test_a_grader_sees_what_there_is_and_the_claim_is_kept(supervisor: Any) -> None:
    verdict, grader = grade(supervisor, "sees", {"answer": "42"})
    assert verdict == Verdict(outcome=Outcome.COMPLETED, reward=1.0, claimed_reward=0.125), verdict
    assert (grader.num_graded, grader.num_retried, grader.num_failed) == (1, 0, 0)


@pytest.mark.parametrize(
    ("name", "kwargs", "reward", "turn_rewards"),
    [
        ("awaits", {}, None, {"t1": 0.25, "t2": 0.5}),
        ("scaled", {"scale": 0.75}, 0.75, {}),
        ("Weighted", {"weight": 3.0}, 3.0, {}),
    ],
)
def test_every_form_of_grader(
    supervisor: Any, name: str, kwargs: Any, reward: Any, turn_rewards: Any
) -> None:
    verdict, _ = grade(supervisor, name, kwargs=kwargs)
    assert (verdict.reward, verdict.turn_rewards) == (reward, turn_rewards), verdict


@pytest.mark.parametrize("result", [None, "words", {"a": "b"}, {1: 2}, float("nan"), [1]])
def test_what_an_agent_returns_plays_no_part(supervisor: Any, result: Any) -> None:
    outcome = Outcome.INVALID_RESULT if result is None else Outcome.COMPLETED

    async def work(grader: Grader) -> Verdict:
        return await grader.grade({}, TRANSCRIPT, report(result, outcome))

    verdict = with_grader(supervisor, "graders:scaled", work, kwargs={"scale": 0.5})
    assert verdict == Verdict(outcome=Outcome.COMPLETED, reward=0.5)


def test_a_grader_has_no_network(supervisor: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        verdict, _ = grade(supervisor, "connects", {"port": listener.getsockname()[1]})
    assert verdict.reward == 1.0, verdict


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("hangs", "timeout: did not end within 0.5 s"),
        ("exits", "exited: exited with code 0"),
        ("leaves", "exited: exited with code 1"),
        ("raises", "exception: ValueError: the grader's own"),
        ("nan", "invalid_result: "),
        ("words", "it returned 'good' (str): a reward is a number"),
        ("nothing", "it returned None (NoneType): a reward is a number"),
        ("empty", "it returned no reward"),
        ("turn", "it returned a reward for 't9', which is no turn"),
    ],
)
def test_a_failure_is_the_graders_own_and_is_tried_twice(
    supervisor: Any, how: str, why: str
) -> None:
    limit_s = 0.5 if how == "hangs" else 30.0
    verdict, grader = grade(supervisor, "fails", {"how": how}, timeout_s=limit_s)
    assert (verdict.outcome, verdict.reward) == (Outcome.GRADER_FAILED, None)
    assert verdict.error.startswith(f"the grader graders:fails failed: {why}")
    assert verdict.claimed_reward == 0.125
    assert (grader.num_graded, grader.num_retried, grader.num_failed) == (0, 1, 1)
    assert ("in fails" in verdict.traceback) == (how == "raises")


def test_a_rollout_without_a_turn_is_not_graded(supervisor: Any) -> None:
    async def work(grader: Grader) -> Verdict:
        return await grader.grade({}, {"prompts": [], "turns": []}, report(1.0))

    verdict = with_grader(supervisor, "graders:fails", work)
    assert verdict == Verdict(outcome=Outcome.COMPLETED, claimed_reward=1.0)


def test_an_import_error_is_known_before_any_rollout(supervisor: Any) -> None:
    with pytest.raises(WorkflowError, match=r"reward=graders:seems: .* did you mean 'sees'"):
        with_grader(supervisor, "graders:seems", lambda grader: grader.warm())
    with pytest.raises(WorkflowError, match="ZeroDivisionError") as caught:
        with_grader(supervisor, "broken_agent:agent", lambda grader: grader.warm())
    assert "broken_agent.py" in str(caught.value)


def test_a_wrong_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="neither 'agent' nor a grader's import path"):
        OpenAIConfig(reward="mine")
    with pytest.raises(ValueError, match="reward=agent is none"):
        OpenAIConfig(reward_kwargs={"a": 1})
