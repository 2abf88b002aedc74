"""The Hermes format, which Qwen2.5 and Qwen3 use too.

    <tool_call>
    {"name": "calc", "arguments": {"a": 7, "b": 8}}
    </tool_call>

Any number of calls, anywhere in the text. White space next to a call is the format's, not content.
A call whose body is not such a JSON object, or that is never closed, is content, tags and all. A
closing tag within one of its strings does not close it; only where nothing else does.
"""

from __future__ import annotations

import json
import re
from typing import Any, ClassVar

from areal_sub.proxy.decode import num_held
from areal_sub.proxy.neutral import MAX_DEPTH, is_deeper_than
from areal_sub.proxy.parsers.pieces import CallSyntax, ParsedCall, Piece, Tag

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_STRING_OR_END = re.compile(f'"|{CLOSE}')
_IN_STRING = re.compile(r'"|\\.', re.DOTALL)


def _before_arguments(name: str) -> tuple[str, ...]:
    written = json.dumps(name, ensure_ascii=False)
    return Tag(OPEN), f'\n{{"name": {written}, "arguments": '


class HermesParser:
    """Holds back: white space, the start of a tag, and a call until it is closed."""

    TAGS: ClassVar[tuple[str, ...]] = (OPEN, CLOSE)
    SYNTAX: ClassVar[CallSyntax] = CallSyntax(
        before=_before_arguments, after=("}\n", Tag(CLOSE)), between=("\n",)
    )

    def __init__(self) -> None:
        self._text = ""  # not yet given
        self._searched = 0  # of `_text`, while it is an open call: no closing tag starts before
        self._in_string = False  # there
        self._is_whole = False  # no more text comes
        self._after_call = False  # white space now is still the format's

    def feed(self, text: str) -> list[Piece]:
        self._text += text
        pieces: list[Piece] = []
        while self._step(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        self._is_whole, self._searched = True, 0
        pieces = self.feed("")
        rest, self._text = self._text, ""
        if self._after_call:
            rest = rest.lstrip()
        return [*pieces, rest] if rest else pieces

    def _step(self, pieces: list[Piece]) -> bool:
        """Move the next certain piece from `_text` to `pieces`; False where there is none."""
        if self._after_call:
            self._text = self._text.lstrip()
        if self._text.lstrip().startswith(OPEN):
            return self._step_call(pieces)
        start = self._text.find(OPEN)
        if start < 0:
            certain = self._text[: len(self._text) - num_held(self._text, OPEN)].rstrip()
            self._give(certain, pieces)
            return False
        return self._give(self._text[:start].rstrip(), pieces)

    def _step_call(self, pieces: list[Piece]) -> bool:
        stop = self._text.find(CLOSE) if self._is_whole else self._find_close()
        if stop < 0:
            return False
        self._searched, self._in_string = 0, False
        written = self._text[: stop + len(CLOSE)]
        call = parse_call(self._text[self._text.index(OPEN) + len(OPEN) : stop])
        if call is None:
            return self._give(written, pieces)
        self._text = self._text[len(written) :]
        self._after_call = True
        pieces.append(call)
        return True

    def _find_close(self) -> int:
        """Where the open call's closing tag starts, -1 where it is not there yet. Looks at every
        character once, however many pieces the text comes in."""
        text = self._text
        while match := (_IN_STRING if self._in_string else _STRING_OR_END).search(
            text, self._searched
        ):
            if match[0] == CLOSE:
                return match.start()
            self._searched = match.end()
            self._in_string ^= match[0] == '"'
        held = int(text.endswith("\\")) if self._in_string else num_held(text, CLOSE)
        self._searched = max(self._searched, len(text) - held)
        return -1

    def _give(self, content: str, pieces: list[Piece]) -> bool:
        """Move `content`, the start of `_text`, to `pieces`."""
        if content:
            self._text = self._text[len(content) :]
            self._after_call = False
            pieces.append(content)
        return bool(content)


def parse_call(body: str) -> ParsedCall | None:
    """The call in `body`, the text between the tags, or None where it is malformed."""
    try:
        call: Any = json.loads(body, parse_constant=_refuse_constant)
        name, arguments = call["name"], call["arguments"]
        if not (isinstance(name, str) and name and isinstance(arguments, dict)):
            return None
        if is_deeper_than(arguments, MAX_DEPTH):
            return None
        text = json.dumps(arguments, ensure_ascii=False)
        (name + text).encode()  # lone surrogates can be escaped in JSON, but not sent
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return ParsedCall(name=name, arguments=text)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
