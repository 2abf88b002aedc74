"""The agents' calculator: right values, and no way to make it slow, large or run code."""

from __future__ import annotations

import pytest

from areal_sub.workflow.arithmetic import MAX_EXPRESSION_CHARS, calculate


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7 * 8", "56"),
        (" 1 + 2 * 3\n", "7"),
        ("-(2 - 5) // 2", "1"),
        ("7 % 4", "3"),
        ("8 / 2", "4"),
        ("1 / 3", "0.333333333333"),
        ("0.1 + 0.2", "0.3"),
        ("2 ** -1", "0.5"),
        ("2 ** 64", "18446744073709551616"),
        ("1e3", "1000"),
    ],
)
def test_values(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "what"),
    [
        ("", "not an arithmetic"),
        ("7 *", "not an arithmetic"),
        ("1\x00", "not an arithmetic"),
        ("(" * MAX_EXPRESSION_CHARS, "not an arithmetic"),
        ("1 +" * MAX_EXPRESSION_CHARS, "longer than"),
        ("1 / 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("2 ** 65", "exponent larger"),
        ("9 ** 9 ** 9", "exponent larger"),
        ("(10 ** 64) ** 64", "too large"),
        ("1e200", "too large"),
        ("1e999", "too large"),
        ("1e999 - 1e999", "too large"),
        ("(-8) ** 0.5", "not a number"),
        ("True + 1", "only numbers"),
        ("1j", "only numbers"),
        ("'a' * 9", "only numbers"),
        ("a", "only numbers"),
        ("1 < 2", "only numbers"),
        ("[1]", "only numbers"),
        ("__import__('os').getcwd()", "only numbers"),
    ],
)
def test_what_has_no_value_says_why(expression: str, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        calculate(expression)


def test_the_deepest_expression_that_fits_has_a_value() -> None:
    assert calculate("-" * (MAX_EXPRESSION_CHARS - 1) + "1") == "-1"
