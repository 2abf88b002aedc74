"""The default run's problems: all there, none in both splits, in the form that agents grade."""

from __future__ import annotations

from typing import Any

import pytest

from areal_sub.config.schema import DatasetConfig
from areal_sub.errors import TaskError
from areal_sub.trainer.datasets import load_tasks
from areal_sub.workflow.arithmetic import calculate
from areal_sub.workflow.grading import grade_math
from examples.proxy.calculator import problems


def load(split: str, seed: int = 1, **settings: Any) -> dict[str, dict[str, Any]]:
    config = DatasetConfig(path="examples.proxy.calculator:tasks", split=split, **settings)
    return {task.task_id: task.data for task in load_tasks(config, seed=seed)}


def test_the_splits_part_all_162_problems() -> None:
    train, valid = problems("train"), problems("valid")
    assert len({*train, *valid}) == len(train) + len(valid) == 2 * 9 * 9
    assert len(valid) == 38


def test_a_task_asks_what_the_calculator_answers() -> None:
    tasks = {**load("train"), **load("valid")}
    assert len(tasks) == 162
    for task_id, data in tasks.items():
        (message,) = data["messages"]
        expression = message["content"].removeprefix("What is ").removesuffix("?")
        assert message["role"] == "user"
        assert task_id.endswith("-" + expression.replace(" ", ""))
        assert grade_math(f"The answer is {calculate(expression)}", data["answer"]) == 1.0


def test_the_seed_orders_the_tasks_but_does_not_choose_them() -> None:
    one, two = load("train", seed=1), load("train", seed=2)
    assert list(one) != list(two)
    assert one == two
    assert list(load("train", seed=1, size=5)) == list(one)[:5]


def test_an_unknown_split_is_an_error() -> None:
    with pytest.raises(TaskError, match="no split 'test'"):
        load("test")
