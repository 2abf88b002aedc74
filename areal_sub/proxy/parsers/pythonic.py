"""Calls in Python's notation, as Llama 3.2 and Llama 4 may write them, and LFM2.

    [calc(a=7, b=8), search(query="x")]

The whole answer is the list; with anything else around it, it is content. Models put
`<|python_start|>` and `<|python_end|>`, or LFM2's tags, around it.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from areal_sub.proxy.parsers.calls import as_call
from areal_sub.proxy.parsers.literals import PythonReader
from areal_sub.proxy.parsers.pieces import ParsedCall, Piece

_AROUND = (
    ("<|python_start|>", "<|python_end|>"),
    ("<|tool_call_start|>", "<|tool_call_end|>"),
)
_MAY_BEGIN = re.compile(r"\s*\[\s*([A-Za-z_][\w.\-]*\s*(\(.*)?)?", re.DOTALL)


class PythonicParser:
    """Holds back: an answer that begins like a list of calls."""

    TAGS: ClassVar[tuple[str, ...]] = tuple(tag for tags in _AROUND for tag in tags)

    def __init__(self) -> None:
        self._text = ""
        self._may_be_calls = True
        self._is_sure = False  # that it begins like one: nothing more to look at before the end

    def feed(self, text: str) -> list[Piece]:
        if not self._may_be_calls:
            return [text] if text else []
        self._text += text
        if self._is_sure or self._begins_like_calls():
            return []
        self._may_be_calls = False
        given, self._text = self._text, ""
        return [given]

    def finish(self) -> list[Piece]:
        text, self._text = self._text, ""
        if not self._may_be_calls:
            return []
        calls = _calls(_unwrapped(text))
        return list(calls) if calls else [text] if text else []

    def _begins_like_calls(self) -> bool:
        bare = self._text.lstrip()
        for tag, _ in _AROUND:
            if tag.startswith(bare):
                return True
            bare = bare.removeprefix(tag)
        bare = bare.lstrip()
        match = _MAY_BEGIN.match(bare)
        self._is_sure = match is not None and match[2] is not None
        return not bare or (match is not None and match.end() == len(bare))


def _unwrapped(text: str) -> str:
    text = text.strip()
    for start, end in _AROUND:
        if text.startswith(start):
            return text.removeprefix(start).removesuffix(end)
    return text


def _calls(text: str) -> list[ParsedCall]:
    """None where anything is not as it should be."""
    reader = PythonReader(text)
    calls: list[ParsedCall] = []
    try:
        reader.expect("[")
        while not reader.take("]"):
            if calls:
                reader.expect(",")
            name = reader.word()
            reader.expect("(")
            arguments: dict[str, Any] = reader.fields(")", "=")
            call = as_call(name, arguments)
            if call is None:
                return []
            calls.append(call)
    except ValueError:
        return []
    return calls if reader.at_end() else []
