"""Strict reading of calls that are written as JSON, for the parsers of every format.

What comes out is always a JSON object's text with finite numbers, sane depth and text that can be
sent; what is not such a call is None, and the parsers leave it in the text.
"""

from __future__ import annotations

import json
import re
from typing import Any

from areal_sub.proxy.neutral import MAX_DEPTH, is_deeper_than
from areal_sub.proxy.parsers.pieces import ParsedCall

_IN_STRING = re.compile(r'["\\]')
_OUTSIDE = re.compile(r'["{}\[\]]')


def read_json(text: str) -> Any:
    """Raises `ValueError`, also for what Python's reader would accept beyond JSON."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deep") from None


def as_call(name: Any, arguments: Any, call_id: Any = "") -> ParsedCall | None:
    """The call of function `name`, or None where that is none."""
    if not (isinstance(name, str) and name and isinstance(arguments, dict)):
        return None
    if is_deeper_than(arguments, MAX_DEPTH):
        return None
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        (name + text).encode()  # lone surrogates can be escaped in JSON, but not sent
    except ValueError:
        return None
    return ParsedCall(name, text, call_id if isinstance(call_id, str) else "")


class JsonEnd:
    """Finds the end of the JSON object or array that a growing text holds, in one pass over it."""

    def __init__(self, start: int) -> None:
        """`start`: the index of its opening bracket."""
        self._position = start
        self._depth = 0
        self._in_string = False

    def find(self, text: str) -> int | None:
        """The index behind it, or None where `text` does not hold all of it yet."""
        while self._position < len(text):
            pattern = _IN_STRING if self._in_string else _OUTSIDE
            match = pattern.search(text, self._position)
            if match is None:
                self._position = len(text)
                return None
            mark, self._position = match[0], match.end()
            if mark == "\\":
                self._position += 1  # behind what it escapes, which may be yet to come
            elif mark == '"':
                self._in_string = not self._in_string
            else:
                self._depth += 1 if mark in "{[" else -1
                if self._depth <= 0:
                    return self._position
        return None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
