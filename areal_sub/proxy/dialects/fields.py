"""Reading fields of a request body: type, range, and an error that names the field.

Explicit null means the same as a missing field, as agents send many. Raises `Refusal` (400).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import orjson

from areal_sub.proxy.neutral import MAX_DEPTH, ToolCall, is_deeper_than
from areal_sub.proxy.refusals import invalid

Body = Mapping[str, Any]

# For all dialects.
MAX_MESSAGES = 4096
MAX_PARTS = 1024  # of one message's content
MAX_TOOLS = 512
MAX_TOOL_CALLS = 128  # of one message
MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_NAME_CHARS = 256
MAX_TEXT_CHARS = 2**24
MAX_TOKENS = 2**31 - 1
# Of a body, whether or not in strings: more than a context has tokens, or any tools have parts, and
# enough to hold up other rollouts' calls while they are read.
MAX_BRACKETS = 2**17
MAX_COMMAS = 2**20


def load(raw: bytes) -> dict[str, Any]:
    """The object that is a request's body."""
    if raw.count(b"[") + raw.count(b"{") > MAX_BRACKETS:
        raise invalid(f"The body of the request has more than {MAX_BRACKETS} opening brackets.")
    if raw.count(b",") > MAX_COMMAS:
        raise invalid(f"The body of the request has more than {MAX_COMMAS} commas.")
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise invalid(f"We could not parse the JSON body of your request: {error}") from None
    if not isinstance(body, dict):
        raise invalid("The body of the request must be a JSON object.")
    if is_deeper_than(body, MAX_DEPTH):
        raise invalid(f"The body of the request nests deeper than {MAX_DEPTH}.")
    return body


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


def name(body: Body, key: str, *, where: str = "") -> str:
    """One that has to be there."""
    value = text(body, key, where=where, max_chars=MAX_NAME_CHARS)
    if not value:
        raise invalid(f"Missing required parameter: '{where}{key}'.", where + key)
    return value


def stops(body: Body, key: str) -> tuple[str, ...]:
    value = body.get(key)
    given = [value] if isinstance(value, str) else items(body, key, at_most=MAX_STOPS)
    for index, stop in enumerate(given):
        if not text({"": stop}, "", where=f"{key}[{index}]", max_chars=MAX_STOP_CHARS):
            raise invalid("A stop sequence must not be empty.", f"{key}[{index}]")
    return tuple(given)


def tool(function: Body, where: str) -> tuple[dict[str, Any], bool]:
    """A tool in the neutral form, from OpenAI's `function`; and whether its schema is strict."""
    name(function, "name", where=where + ".")
    shown = {key: item for key, item in function.items() if item is not None and key != "strict"}
    return {"type": "function", "function": shown}, function.get("strict") is True


def tool_call(call_id: str, called: str, arguments: Any, where: str) -> ToolCall:
    """`arguments`: JSON text, or an object, as some agents send."""
    if isinstance(arguments, dict):
        arguments = orjson.dumps(arguments).decode()
    written = text({"": arguments}, "", where=where, max_chars=MAX_TEXT_CHARS)
    call = ToolCall(call_id, called, written)
    if is_deeper_than(call.parsed_arguments(), MAX_DEPTH):
        raise invalid(f"{where} nest deeper than {MAX_DEPTH}.", where)
    return call


def joined(value: Any, where: str, kinds: Collection[str]) -> str:
    """A text, or the text of all parts, one after the other, whose `type` is one of `kinds`."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    parts = items({where: value}, where, at_most=MAX_PARTS)
    return "".join(part_text(part, f"{where}[{i}]", kinds) for i, part in enumerate(parts))


def part_text(value: Any, where: str, kinds: Collection[str]) -> str:
    part = as_mapping(value, where)
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in kinds:
        raise invalid(f"{where}.type: the policy reads text, not {kind!r}.", f"{where}.type")
    key = "refusal" if kind == "refusal" else "text"
    return text(part, key, where=where + ".", max_chars=MAX_TEXT_CHARS)


_NAMES = {bool: "a boolean", int: "an integer", float: "a number", str: "a string"}


def _wrong(value: Any, where: str, expected: str) -> Exception:
    found = _NAMES.get(type(value), "an array" if isinstance(value, list) else "an object")
    return invalid(f"Invalid type for '{where}': expected {expected}, but got {found}.", where)
