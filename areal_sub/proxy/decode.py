"""Sampled tokens to text, piece by piece.

`TextDecoder` never gives half of a character; `StopStrings` never gives text that might be the
start of a stop string. Both hold back what they cannot yet give, and `finish` lets it go. Pure
state machines; `turns.py` runs one of each per choice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Sequence

REPLACEMENT = "\ufffd"
# A UTF-8 character has at most 4 bytes, so a 5th token cannot be needed to complete one.
MAX_HELD_TOKENS = 4
# Emitted tokens that are decoded again in front of new ones: some decoders treat the start of a
# text differently (SentencePiece drops its space).
NUM_OVERLAP = 4


class TextDecoder:
    """`feed` token ids, get the text that is certain. `hidden` ids (end of turn) have no text."""

    def __init__(self, decode: Callable[[Sequence[int]], str], hidden: Container[int]) -> None:
        self._decode = decode
        self._hidden = hidden
        self._overlap: list[int] = []
        self._pending: list[int] = []

    def feed(self, token_ids: Sequence[int]) -> str:
        hidden = self._hidden
        self._pending += [token_id for token_id in token_ids if token_id not in hidden]
        if not self._pending:
            return ""
        text = self._text(self._pending)
        if not text.endswith(REPLACEMENT):
            return self._emit(len(self._pending), text)
        for num_held in range(1, min(MAX_HELD_TOKENS, len(self._pending) - 1) + 1):
            cut = len(self._pending) - num_held
            shorter = self._text(self._pending[:cut])
            if not shorter.endswith(REPLACEMENT):
                return self._emit(cut, shorter)
        if len(self._pending) <= MAX_HELD_TOKENS:
            return ""
        return self._emit(len(self._pending), text)  # it really is not UTF-8

    def finish(self) -> str:
        return self._emit(len(self._pending), self._text(self._pending)) if self._pending else ""

    def _text(self, token_ids: list[int]) -> str:
        if not self._overlap:
            return self._decode(token_ids)
        return self._decode(self._overlap + token_ids)[len(self._decode(self._overlap)) :]

    def _emit(self, num_tokens: int, text: str) -> str:
        self._overlap = (self._overlap + self._pending[:num_tokens])[-NUM_OVERLAP:]
        del self._pending[:num_tokens]
        return text


class StopStrings:
    """`feed` text, get what lies before any stop string; `found` is the first complete one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._begun = [_Begun(stop) for stop in stops]
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """Must not be called again once `found`."""
        if not self._stops:
            return text
        num_begun = max(begun.feed(text) for begun in self._begun)
        text = self._held + text
        starts = [(start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if starts:
            start, self.found = min(starts)
            self._held = ""
            return text[:start]
        cut = len(text) - num_begun
        self._held = text[cut:]
        return text[:cut]

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


class _Begun:
    """How much of the start of a stop string a growing text ends with, as Knuth, Morris and Pratt
    find it: a few steps for each character, whatever agents have the policy say."""

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self._shorter = _borders(stop)
        self._num = 0

    def feed(self, text: str) -> int:
        num = self._num
        for char in text:
            while num and (num == len(self._stop) or self._stop[num] != char):
                num = self._shorter[num - 1]
            num += self._stop[num] == char
        self._num = num
        return num


@functools.lru_cache(256)
def _borders(stop: str) -> Sequence[int]:
    """For each start of `stop`: how much of it its own end repeats."""
    borders = [0]
    for char in stop[1:]:
        num = borders[-1]
        while num and stop[num] != char:
            num = borders[num - 1]
        borders.append(num + (stop[num] == char))
    return borders


def num_held(text: str, tag: str) -> int:
    """Length of the longest end of `text` that is a proper start of `tag`."""
    for length in range(min(len(text), len(tag) - 1), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0
