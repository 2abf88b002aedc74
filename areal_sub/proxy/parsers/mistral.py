"""Mistral's calls and thinking.

    [TOOL_CALLS][{"name": "calc", "arguments": {"a": 7}, "id": "A1b2C3d4E"}]      until v7
    [TOOL_CALLS]calc[CALL_ID]A1b2C3d4E[ARGS]{"a": 7}[TOOL_CALLS]…                 v11
    [TOOL_CALLS]calc[ARGS]{"a": 7}[TOOL_CALLS]…                                   v13

The tags are control tokens and have no closing twin. White space behind a call is the format's. A
malformed call is content, tags and all.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from areal_sub.proxy.decode import num_held
from areal_sub.proxy.parsers.calls import JsonEnd, as_call, read_json
from areal_sub.proxy.parsers.pieces import ParsedCall, Piece
from areal_sub.proxy.parsers.think import ThinkParser

# A tag, a name and an id. What is longer is no call.
MAX_HEAD_CHARS = 512
# Templates take these ids only.
CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")
_JSON = re.compile(r"\{|\[(?=\s*\{)")  # "[" may also begin a tag
_HEAD = re.compile(
    r"\s*(?P<name>[^\s\[\]{}]+)\s*"
    r"(?:\[CALL_ID\]\s*(?P<id>[a-zA-Z0-9]{9})\s*)?"
    r"(?:\[ARGS\])?\s*"
)


class MistralParser:
    """Holds back: the start of a tag, and calls until they are complete."""

    OPEN: ClassVar[str] = "[TOOL_CALLS]"
    TAGS: ClassVar[tuple[str, ...]] = (OPEN, "[ARGS]", "[CALL_ID]")

    def __init__(self) -> None:
        self._text = ""  # not yet given
        self._end: JsonEnd | None = None  # of the JSON in the call that `_text` begins with
        self._json_start = 0
        self._after_call = False

    def feed(self, text: str) -> list[Piece]:
        self._text += text
        pieces: list[Piece] = []
        while self._step(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        rest, self._text = self._text, ""
        if self._after_call:
            rest = rest.lstrip()
        return [rest] if rest else []

    def _step(self, pieces: list[Piece]) -> bool:
        """Move the next certain piece from `_text` to `pieces`; False where there is none."""
        if self._after_call:
            self._text = self._text.lstrip()
        start = self._text.find(self.OPEN)
        if start == 0:
            return self._step_call(pieces)
        certain = start if start > 0 else len(self._text) - num_held(self._text, self.OPEN)
        if not certain:
            return False
        self._give(certain, pieces)
        return start > 0

    def _step_call(self, pieces: list[Piece]) -> bool:
        if self._end is None and not self._find_json():
            following = self._text.find(self.OPEN, len(self.OPEN))
            if following < 0 and len(self._text) <= MAX_HEAD_CHARS:
                return False
            self._give(len(self.OPEN), pieces)
            return True
        assert self._end is not None
        stop = self._end.find(self._text)
        if stop is None:
            return False
        head = self._text[len(self.OPEN) : self._json_start]
        calls = _calls(head, self._text[self._json_start : stop])
        self._end = None
        if not calls:
            self._give(stop, pieces)
            return True
        pieces += calls
        self._text = self._text[stop:]
        self._after_call = True
        return True

    def _find_json(self) -> bool:
        """Whether the open call has come to its list, or to its arguments."""
        following = self._text.find(self.OPEN, len(self.OPEN))
        last = min(following if following >= 0 else len(self._text), MAX_HEAD_CHARS)
        bracket = _JSON.search(self._text, len(self.OPEN), last)
        if bracket is not None:
            self._json_start = bracket.start()
            self._end = JsonEnd(self._json_start)
        return bracket is not None

    def _give(self, num_chars: int, pieces: list[Piece]) -> None:
        pieces.append(self._text[:num_chars])
        self._text = self._text[num_chars:]
        self._after_call = False


class MistralThinkParser(ThinkParser):
    OPEN: ClassVar[str] = "[THINK]"
    CLOSE: ClassVar[str] = "[/THINK]"
    TAGS: ClassVar[tuple[str, ...]] = (OPEN, CLOSE)


def _calls(head: str, text: str) -> list[ParsedCall]:
    try:
        written: Any = read_json(text)
    except ValueError:
        return []
    if isinstance(written, list):
        calls = [_listed(item) for item in written] if not head.strip() else []
    else:
        match = _HEAD.fullmatch(head)
        calls = [as_call(match["name"], written, match["id"] or "")] if match else []
    return [call for call in calls if call is not None] if None not in calls else []


def _listed(item: Any) -> ParsedCall | None:
    if not isinstance(item, dict):
        return None
    call_id = item.get("id", "")
    usable = isinstance(call_id, str) and CALL_ID.fullmatch(call_id)
    return as_call(item.get("name"), item.get("arguments"), call_id if usable else "")
