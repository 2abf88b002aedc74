"""Calls between an opening and a closing tag: what Hermes, Qwen3-Coder and Gemma 4 have in common.

Any number of calls, anywhere in the text. White space next to a call is the format's, not content.
A call whose body is malformed, or that is never closed, is content, tags and all.
"""

from __future__ import annotations

from typing import ClassVar

from areal_sub.proxy.decode import num_held
from areal_sub.proxy.parsers.pieces import ParsedCall, Piece


class TaggedParser:
    """Holds back: white space, the start of a tag, and a call until it is closed."""

    OPEN: ClassVar[str]
    CLOSE: ClassVar[str]
    TAGS: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        self._text = ""  # not yet given
        self._searched = 0  # of `_text`, while it is an open call: no closing tag starts before
        self._is_whole = False  # no more text comes
        self._after_call = False  # white space now is still the format's

    def calls(self, body: str) -> list[ParsedCall]:
        """The calls in `body`, the text between the tags; none where it is malformed."""
        raise NotImplementedError

    def find_close(self) -> int:
        """Where the open call's closing tag starts, -1 where it is not there yet. Looks at every
        character once, however many pieces the text comes in."""
        stop = self._text.find(self.CLOSE, self._searched)
        if stop < 0:
            self._searched = max(0, len(self._text) - len(self.CLOSE) + 1)
        return stop

    def forget_search(self) -> None:
        self._searched = 0

    def feed(self, text: str) -> list[Piece]:
        self._text += text
        pieces: list[Piece] = []
        while self._step(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        self._is_whole = True
        self.forget_search()
        pieces = self.feed("")
        rest, self._text = self._text, ""
        if self._after_call:
            rest = rest.lstrip()
        return [*pieces, rest] if rest else pieces

    def _step(self, pieces: list[Piece]) -> bool:
        """Move the next certain piece from `_text` to `pieces`; False where there is none."""
        if self._after_call:
            self._text = self._text.lstrip()
        if self._text.lstrip().startswith(self.OPEN):
            return self._step_call(pieces)
        start = self._text.find(self.OPEN)
        if start < 0:
            certain = self._text[: len(self._text) - num_held(self._text, self.OPEN)].rstrip()
            self._give(certain, pieces)
            return False
        return self._give(self._text[:start].rstrip(), pieces)

    def _step_call(self, pieces: list[Piece]) -> bool:
        stop = self.find_close()
        if stop < 0:
            return False
        self.forget_search()
        written = self._text[: stop + len(self.CLOSE)]
        calls = self.calls(self._text[self._text.index(self.OPEN) + len(self.OPEN) : stop])
        if not calls:
            return self._give(written, pieces)
        self._text = self._text[len(written) :]
        self._after_call = True
        pieces += calls
        return True

    def _give(self, content: str, pieces: list[Piece]) -> bool:
        """Move `content`, the start of `_text`, to `pieces`."""
        if content:
            self._text = self._text[len(content) :]
            self._after_call = False
            pieces.append(content)
        return bool(content)
