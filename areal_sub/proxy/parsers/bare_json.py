"""Llama 3.x's calls: the answer is a JSON object, or several with `;` between them.

    {"name": "calc", "parameters": {"a": 7, "b": 8}}

No tag says that a call begins, so only an answer that begins with one has calls; what follows the
last of them is content. `<|python_tag|>` in front is the format's.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

from areal_sub.proxy.parsers.calls import JsonEnd, as_call, read_json
from areal_sub.proxy.parsers.pieces import CallSyntax, ParsedCall, Piece


def _before_arguments(name: str) -> tuple[str, ...]:
    return (f'{{"name": {json.dumps(name, ensure_ascii=False)}, "parameters": ',)


class BareJsonParser:
    """Holds back: an answer that begins like a call, until it is one or is none."""

    PYTHON_TAG: ClassVar[str] = "<|python_tag|>"
    TAGS: ClassVar[tuple[str, ...]] = (PYTHON_TAG,)
    SYNTAX: ClassVar[CallSyntax] = CallSyntax(
        before=_before_arguments, after=("}",), between=("; ",)
    )

    def __init__(self) -> None:
        self._text = ""  # not yet given
        self._end: JsonEnd | None = None  # of the object that `_text` begins with
        self._after_call = False
        self._is_content = False  # from here on

    def feed(self, text: str) -> list[Piece]:
        self._text += text
        pieces: list[Piece] = []
        while not self._is_content and self._step(pieces):
            pass
        if self._is_content and self._text:
            pieces.append(self._text)
            self._text = ""
        return pieces

    def finish(self) -> list[Piece]:
        rest, self._text = self._text, ""
        if self._after_call:
            rest = rest.lstrip(" \t\r\n;")
        return [rest] if rest else []

    def _step(self, pieces: list[Piece]) -> bool:
        """Move a complete call from `_text` to `pieces`; False where there is none yet, or ever."""
        if self._after_call and self._end is None:
            self._text = self._text.lstrip(" \t\r\n;")
        start = _start(self._text, self.PYTHON_TAG)
        if start is None:
            return False
        if not self._text.startswith("{", start):
            self._is_content = True
            return False
        self._end = self._end or JsonEnd(start)
        stop = self._end.find(self._text)
        if stop is None:
            return False
        call = _call(self._text[start:stop])
        self._end = None
        if call is None:
            self._is_content = True
            return False
        pieces.append(call)
        self._text = self._text[stop:]
        self._after_call = True
        return True


def _start(text: str, tag: str) -> int | None:
    """Where the object begins, or something that is none; None where neither is there yet."""
    bare = text.lstrip()
    if tag.startswith(bare):  # also where it is empty
        return None
    if bare.startswith(tag):
        behind = bare[len(tag) :].lstrip()
        return len(text) - len(behind) if behind else None
    return len(text) - len(bare)


def _call(text: str) -> ParsedCall | None:
    try:
        written: Any = read_json(text)
    except ValueError:
        return None
    if not isinstance(written, dict):
        return None
    return as_call(written.get("name"), written.get("parameters", written.get("arguments")))
