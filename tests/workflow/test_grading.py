"""What counts as the final answer in a text, and when it equals the task's."""

from __future__ import annotations

from fractions import Fraction

import pytest

from areal_sub.workflow.grading import final_answer, grade_math, number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("56", "56"),
        ("The answer is 56.", "56"),
        ("7 * 8 = 56", 56),
        ("First 12, then 56", "56"),
        ("It costs $1,234.50.", "1234.5"),
        ("about -.5", -0.5),
        ("3/4", "0.75"),
        ("\\boxed{56} as 7 * 9 = 63", "56"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("#### 18\nThat is 9 + 9.", "She has 9 + 9 eggs.\n#### 18"),
        ("<answer>1</answer> no: <answer> 2 </answer>", "2"),
        ("Paris.", "paris"),
        ("<answer>**Paris**</answer>, 2 words", "Paris"),
    ],
)
def test_right(text: str, answer: object) -> None:
    assert grade_math(text, answer) == 1.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", "56"),
        ("56 or 57", "56"),
        ("fifty-six", "56"),
        ("156", "56"),
        ("x56", "56"),
        ("1/0", "0"),
        ("9" * 10_000, "9"),
        ("<answer>57</answer> 56", "56"),
        ("It is Paris", "Paris"),
        ("", "Paris"),
    ],
)
def test_wrong(text: str, answer: object) -> None:
    assert grade_math(text, answer) == 0.0


@pytest.mark.parametrize(
    ("text", "value"),
    [("-1,200", -1200), ("50%", 50), ("1/3", Fraction(1, 3)), ("0.10", Fraction(1, 10))],
)
def test_numbers_are_exact(text: str, value: Fraction) -> None:
    assert number(text) == value


@pytest.mark.parametrize("text", ["", "-", "1e5", "1/0", "1.2.3", "٣", "9" * 65])
def test_what_is_no_number(text: str) -> None:
    assert number(text) is None


@pytest.mark.parametrize("text", ["nothing", "\\boxed{never closed", "<answer>1"])
def test_nothing_is_marked(text: str) -> None:
    assert final_answer(text) is None
