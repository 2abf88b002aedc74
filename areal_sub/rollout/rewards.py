"""What an agent returned, judged: a final reward, rewards by turn, or not a reward. Pure.

Called for the result of every rollout that completed, in both modes. The value is hostile.
"""

from __future__ import annotations

import math
import reprlib
from typing import Any

from areal_sub.errors import WorkflowError

_show = reprlib.Repr()
_show.maxstring = _show.maxother = 120


def judge_result(value: Any) -> tuple[float | None, dict[str, float]]:
    """(final reward, {}) for a number or bool; (None, turn id → reward) for a dict of them.

    Numbers of numpy and torch count. Raises `WorkflowError` saying what was returned instead.
    """
    if isinstance(value, dict):
        return None, {_turn_id(key): _number(entry, key) for key, entry in value.items()}
    return _number(value, None), {}


def _turn_id(key: Any) -> str:
    if not isinstance(key, str):
        raise WorkflowError(
            f"the agent returned a dict with the key {_show.repr(key)}: rewards are keyed by "
            f"completion id, a string"
        )
    return key


def _number(value: Any, key: Any) -> float:
    where = "" if key is None else f" for turn {_show.repr(key)}"
    if isinstance(value, str | bytes) or not hasattr(type(value), "__float__"):
        shown = f"{_show.repr(value)} ({type(value).__name__})"
        raise WorkflowError(
            f"the agent returned {shown}{where}: a reward is a number, or a dict of numbers keyed "
            f"by completion id"
        )
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise WorkflowError(
            f"the agent returned {_show.repr(value)}{where}, which is not one number: {error}"
        ) from None
    if not math.isfinite(number):
        raise WorkflowError(f"the agent returned {number}{where}: a reward must be finite")
    return number
