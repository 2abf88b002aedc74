"""What an agent or a grader returned, judged: one reward, rewards by turn, or no reward. Pure.

Called for the result of every rollout that completed, in both modes. The value is hostile.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass, field
from typing import Any

from areal_sub.errors import WorkflowError
from areal_sub.records import Outcome, RunReport

WANTED = "a reward is a number, or a dict of numbers keyed by completion id"

_show = reprlib.Repr()
_show.maxstring = _show.maxother = 120

MAX_REWARD = 1e9
"""Training computes in float32, for a group or a batch at once: one reward of 1e39 would be
infinite there, and what its neighbours learn no number."""

Reward = float | dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """How a rollout counts."""

    outcome: Outcome
    error: str = ""
    traceback: str = ""
    reward: float | None = None
    turn_rewards: dict[str, float] = field(default_factory=dict)
    claimed_reward: Reward | None = None  # with a grader: what the agent returned


def word_of_the_agent(report: RunReport) -> Verdict:
    """The verdict where the agent's own result is its reward."""
    outcome, error = report.outcome, report.error
    reward: float | None = None
    turn_rewards: dict[str, float] = {}
    if outcome is Outcome.COMPLETED:
        try:
            reward, turn_rewards = judge_result(report.result)
        except WorkflowError as invalid:
            outcome, error = Outcome.INVALID_RESULT, str(invalid)
    return Verdict(
        outcome=outcome,
        error=error,
        traceback=report.traceback,
        reward=reward,
        turn_rewards=turn_rewards,
    )


def claim_of(report: RunReport) -> Reward | None:
    """The reward in what the agent returned, if that is one."""
    try:
        reward, turn_rewards = judge_result(report.result)
    except WorkflowError:
        return None
    return turn_rewards if reward is None else reward


def judge_result(value: Any, who: str = "the agent") -> tuple[float | None, dict[str, float]]:
    """(final reward, {}) for a number or bool; (None, turn id → reward) for a dict of them.

    Numbers of numpy and torch count. Raises `WorkflowError` saying what was returned instead.
    """
    if isinstance(value, dict):
        return None, {_turn_id(key, who): _number(entry, key, who) for key, entry in value.items()}
    return _number(value, None, who), {}


def _turn_id(key: Any, who: str) -> str:
    if not isinstance(key, str):
        raise WorkflowError(
            f"{who} returned a dict with the key {_show.repr(key)}: rewards are keyed by "
            f"completion id, a string"
        )
    return key


def _number(value: Any, key: Any, who: str) -> float:
    where = "" if key is None else f" for turn {_show.repr(key)}"
    if isinstance(value, str | bytes) or not hasattr(type(value), "__float__"):
        shown = f"{_show.repr(value)} ({type(value).__name__})"
        raise WorkflowError(f"{who} returned {shown}{where}: {WANTED}")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise WorkflowError(
            f"{who} returned {_show.repr(value)}{where}, which is not one number: {error}"
        ) from None
    if not math.isfinite(number):
        raise WorkflowError(f"{who} returned {number}{where}: a reward must be finite")
    if abs(number) > MAX_REWARD:
        raise WorkflowError(
            f"{who} returned {number:g}{where}: a reward is a number from -{MAX_REWARD:g} to "
            f"{MAX_REWARD:g}"
        )
    return number
