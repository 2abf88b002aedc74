"""A calculator for agents: arithmetic text in, its value out, without `eval`.

The text comes from a model, so it is hostile: its length, its operators and the size of every
intermediate value are bounded, which bounds time and memory. Pure; used by the ready agents.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable

MAX_EXPRESSION_CHARS = 200
MAX_EXPONENT = 64
MAX_MAGNITUDE = 10**100

Number = int | float

_BINARY: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type[ast.unaryop], Callable[[Number], Number]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def calculate(expression: str) -> str:
    """The value of `expression` (numbers, `+ - * / // % **` and parentheses) as text.

    Whole values are written without a decimal point, others with 12 significant digits.
    Raises `ValueError` with one line, meant for the model, where there is no such value.
    """
    if len(expression) > MAX_EXPRESSION_CHARS:
        raise ValueError(f"expression longer than {MAX_EXPRESSION_CHARS} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise ValueError("not an arithmetic expression") from None
    try:
        value = _evaluate(tree.body)
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except OverflowError:
        raise ValueError("the result is too large") from None
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else format(value, ".12g")
    return str(value)


def _evaluate(node: ast.expr) -> Number:
    match node:
        # `type(...)` rather than isinstance: True is an int, and no number here.
        case ast.Constant(value=value) if type(value) in (int, float):
            return _bounded(value)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_evaluate(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            a, b = _evaluate(left), _evaluate(right)
            if isinstance(op, ast.Pow) and abs(b) > MAX_EXPONENT:
                raise ValueError(f"exponent larger than {MAX_EXPONENT}")
            return _bounded(_BINARY[type(op)](a, b))
    raise ValueError("only numbers, + - * / // % ** and parentheses are allowed")


def _bounded(value: object) -> Number:
    # A negative number to a fractional power is complex.
    if not isinstance(value, int | float) or (isinstance(value, float) and math.isnan(value)):
        raise ValueError("the result is not a number")
    if abs(value) > MAX_MAGNITUDE:
        raise ValueError("the result is too large")
    return value
