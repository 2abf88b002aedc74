"""What counts as a reward, and what is said of what does not."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from areal_sub.errors import WorkflowError
from areal_sub.rollout.rewards import judge_result


@pytest.mark.parametrize(
    ("value", "reward"),
    [(0.5, 0.5), (1, 1.0), (True, 1.0), (np.float32(0.25), 0.25), (np.array(2), 2.0)],
)
def test_a_number_is_the_final_reward(value: Any, reward: float) -> None:
    judged, turn_rewards = judge_result(value)
    assert (judged, turn_rewards) == (reward, {})
    assert type(judged) is float


def test_a_dict_is_rewards_by_turn() -> None:
    assert judge_result({"a": 1, "b": np.float64(0.5), "c": False}) == (
        None,
        {"a": 1.0, "b": 0.5, "c": 0.0},
    )
    assert judge_result({}) == (None, {})


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("a lot", "'a lot' (str): a reward is a number"),
        ("1.0", "'1.0' (str)"),
        (None, "None (NoneType)"),
        (math.nan, "nan: a reward must be finite"),
        (-math.inf, "-inf: a reward must be finite"),
        (1e39, "1e+39: a reward is a number from -1e+09 to 1e+09"),
        ({"a": -1e10}, "-1e+10 for turn 'a': a reward is a number from"),
        ([1.0], "[1.0] (list)"),
        ({"a": {"b": 1.0}}, "for turn 'a'"),
        ({"a": math.nan}, "nan for turn 'a'"),
        ({"a": "b"}, "'b' (str) for turn 'a'"),
        ({1: 1.0}, "the key 1"),
        (10**400, "not one number"),
        (np.ones(3), "not one number"),
        (1j, "complex"),
    ],
)
def test_anything_else_is_named(value: Any, complaint: str) -> None:
    with pytest.raises(WorkflowError) as caught:
        judge_result(value)
    assert complaint in str(caught.value)


def test_what_is_shown_of_it_is_bounded() -> None:
    for value in ("x" * 10**6, {"k" * 10**6: "x"}, ["x" * 10**6] * 100, {"a": "\x1b[31m"}):
        with pytest.raises(WorkflowError) as caught:
            judge_result(value)
        assert len(str(caught.value)) < 1000
        assert "\x1b" not in str(caught.value)
