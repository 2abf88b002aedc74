"""Reasoning between tags in front of the answer, as Qwen3, DeepSeek-R1 and their like write it.

    <think>
    What is 7 * 8? ...
    </think>

    56

Only at the start of an answer; or, where the chat template opens the tag itself, from its first
character on. White space around both parts is the format's. Reasoning that is never closed is
reasoning all the same: the answer was cut.
"""

from __future__ import annotations

from typing import ClassVar

from areal_sub.proxy.decode import num_held


class ThinkParser:
    """Holds back: white space at a part's edge, and what may be the start of a tag."""

    OPEN: ClassVar[str] = "<think>"
    CLOSE: ClassVar[str] = "</think>"
    TAGS: ClassVar[tuple[str, ...]] = (OPEN, CLOSE)

    def __init__(self, prompt_end: str = "") -> None:
        """`prompt_end`: the last text of the prompt."""
        self._text = ""  # not yet given
        self._is_first = True  # nothing was given of the part that we are in
        self._part = "reasoning" if prompt_end.rstrip().endswith(self.OPEN) else "start"

    def feed(self, text: str) -> tuple[str, str]:
        """(reasoning, content) that are certain by now."""
        self._text += text
        if self._part == "start" and not self._begin():
            return "", ""
        reasoning = self._reasoning() if self._part == "reasoning" else ""
        return reasoning, self._content() if self._part == "content" else ""

    def finish(self) -> tuple[str, str]:
        rest, self._text = self._text, ""
        if self._part == "reasoning":
            return rest.strip() if self._is_first else rest.rstrip(), ""
        return "", rest if self._part == "start" else ""

    def _begin(self) -> bool:
        """Whether it is known by now which part comes first."""
        start = self._text.lstrip()
        if start.startswith(self.OPEN):
            self._part, self._text = "reasoning", start[len(self.OPEN) :]
        elif self.OPEN.startswith(start):
            return False
        else:
            self._part, self._is_first = "content", False  # white space is the answer's own
        return True

    def _reasoning(self) -> str:
        if self._is_first:
            self._text = self._text.lstrip()
        stop = self._text.find(self.CLOSE)
        if stop >= 0:
            given, self._text = self._text[:stop].rstrip(), self._text[stop + len(self.CLOSE) :]
            self._part, self._is_first = "content", True
            return given
        given = self._text[: len(self._text) - num_held(self._text, self.CLOSE)].rstrip()
        self._text = self._text[len(given) :]
        self._is_first = self._is_first and not given
        return given

    def _content(self) -> str:
        given, self._text = self._text, ""
        if self._is_first:
            given = given.lstrip()
            self._is_first = not given
        return given
