"""Reading fields of a request body: type, range, and an error that names the field.

Explicit null means the same as a missing field, as agents send many. Raises `Refusal` (400).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from areal_sub.proxy.refusals import invalid

Body = Mapping[str, Any]


def text(body: Body, key: str, *, where: str = "", max_chars: int, default: str = "") -> str:
    value = body.get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        raise _wrong(value, where + key, "a string")
    if len(value) > max_chars:
        raise invalid(f"{where}{key} is longer than {max_chars} characters", where + key)
    return value


def boolean(body: Body, key: str, *, where: str = "") -> bool:
    value = body.get(key)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise _wrong(value, where + key, "a boolean")
    return value


def integer(body: Body, key: str, *, at_least: int, at_most: int) -> int | None:
    value = body.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong(value, key, "an integer")
    if not at_least <= value <= at_most:
        raise invalid(f"{key} must be from {at_least} to {at_most}, not {value}", key)
    return value


def number(body: Body, key: str, *, at_least: float, at_most: float) -> float | None:
    value = body.get(key)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _wrong(value, key, "a number")
    if not at_least <= value <= at_most:
        raise invalid(f"{key} must be from {at_least} to {at_most}, not {value}", key)
    return float(value)


def mapping(body: Body, key: str, *, where: str = "") -> dict[str, Any]:
    value = body.get(key)
    if value is None:
        return {}
    return as_mapping(value, where + key)


def as_mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(value, where, "an object")
    return value


def items(body: Body, key: str, *, where: str = "", at_most: int) -> list[Any]:
    value = body.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise _wrong(value, where + key, "an array")
    if len(value) > at_most:
        raise invalid(f"{where}{key} has {len(value)} entries; at most {at_most}", where + key)
    return value


_NAMES = {bool: "a boolean", int: "an integer", float: "a number", str: "a string"}


def _wrong(value: Any, where: str, expected: str) -> Exception:
    found = _NAMES.get(type(value), "an array" if isinstance(value, list) else "an object")
    return invalid(f"Invalid type for '{where}': expected {expected}, but got {found}.", where)
