"""One parser for a whole answer: what it thought, what it says, what it calls.

A format either tells these apart in one go (harmony), or with one parser for its reasoning, in
front, and one for its calls, in the rest.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

from areal_sub.proxy.neutral import Thought
from areal_sub.proxy.parsers.pieces import Piece
from areal_sub.proxy.parsers.think import ThinkParser


class AnswerParser(Protocol):
    """`feed` text; then `finish` once. Pieces come in the order of the text."""

    def feed(self, text: str) -> list[Piece]: ...

    def finish(self) -> list[Piece]: ...


class ToolCallParser(AnswerParser, Protocol):
    TAGS: ClassVar[tuple[str, ...]]  # texts that must reach `feed` even where they are tokens


class TwoPartParser:
    """Either part may be None: nothing is read there."""

    def __init__(self, thinking: ThinkParser | None, calls: AnswerParser | None) -> None:
        self._thinking = thinking
        self._calls = calls

    def feed(self, text: str) -> list[Piece]:
        if self._thinking is None:
            return self._content(text)
        reasoning, content = self._thinking.feed(text)
        return [*_thought(reasoning), *self._content(content)]

    def finish(self) -> list[Piece]:
        pieces: list[Piece] = []
        if self._thinking is not None:
            reasoning, content = self._thinking.finish()
            pieces += [*_thought(reasoning), *self._content(content)]
        return [*pieces, *(self._calls.finish() if self._calls is not None else ())]

    def _content(self, text: str) -> list[Piece]:
        if not text:
            return []
        return [text] if self._calls is None else self._calls.feed(text)


def _thought(text: str) -> list[Piece]:
    return [Thought(text)] if text else []
