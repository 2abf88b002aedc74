"""Harmony, the format of GPT-OSS: an answer is a series of messages on channels.

    <|channel|>analysis<|message|>What is 7 * 8? …<|end|>
    <|start|>assistant<|channel|>commentary to=functions.calc <|constrain|>json<|message|>{"a": 7}
    <|call|>

`analysis` is reasoning; a message to a function is a call, on whatever channel; everything else is
content. The prompt ends inside the first message's header (`<|start|>assistant`), or behind it. A
malformed call, and what has no header, is content as it was written; a header that is cut is not.
Two messages of one kind are kept apart by an empty line.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from areal_sub.proxy.decode import num_held
from areal_sub.proxy.neutral import Thought
from areal_sub.proxy.parsers.calls import as_call, read_json
from areal_sub.proxy.parsers.pieces import ParsedCall, Piece

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>", START)
FUNCTIONS = "functions."
# A header is a role, a channel, a recipient and a type. What is longer is no header.
MAX_HEADER_CHARS = 512

_RECIPIENT = re.compile(r"to=(\S+?)(?=\s|<|$)")
_CUT_HEADER = re.compile(r"\s*(<\||to=)")
_ANY_END = re.compile("|".join(map(re.escape, ENDS)))


class HarmonyParser:
    """Holds back: headers, the start of a tag, and a call until its message ends."""

    TAGS: ClassVar[tuple[str, ...]] = (START, CHANNEL, MESSAGE, *ENDS[:-1], "<|constrain|>")

    def __init__(self, prompt_end: str = "") -> None:
        """`prompt_end`: the last text of the prompt."""
        self._text = ""  # not yet given
        self._header = ""  # of the message that we are in, as it was written
        self._in_header = True
        self._kind = "content"
        self._begun: set[str] = set()  # kinds of which a message has been given
        self._is_first = True  # nothing was given of the message that we are in
        opened = prompt_end.rpartition(START)[2]
        if MESSAGE in opened:  # the prompt wrote the first header
            self._begin(opened.partition(MESSAGE)[0])
            self._header = ""

    def feed(self, text: str) -> list[Piece]:
        self._text += text
        pieces: list[Piece] = []
        while self._step(pieces):
            pass
        return pieces

    def finish(self) -> list[Piece]:
        pieces: list[Piece] = []
        rest, self._text = self._text, ""
        if self._in_header:
            if rest.strip() and not _CUT_HEADER.match(rest):
                self._kind = "content"
                self._give(rest, pieces)
        elif self._kind == "call":  # never closed: the answer was cut
            self._give_as_content(rest, pieces)
        else:
            self._give(rest, pieces)
        return pieces

    def _step(self, pieces: list[Piece]) -> bool:
        """Move the next certain piece from `_text` to `pieces`; False where there is none."""
        if self._in_header:
            return self._step_header(pieces)
        end = _ANY_END.search(self._text)
        if end is None:
            if self._kind != "call":
                held = max(num_held(self._text, tag) for tag in ENDS)
                certain = self._text[: len(self._text) - held]
                self._text = self._text[len(certain) :]
                self._give(certain, pieces)
            return False
        body = self._text[: end.start()]
        # A message that begins where another should have ended keeps its own start.
        self._text = self._text[end.start() if end[0] == START else end.end() :]
        self._in_header = True
        if self._kind != "call":
            self._give(body, pieces)
            return True
        call = self._call(body)
        if call is None:
            self._give_as_content(body + ("" if end[0] == START else end[0]), pieces)
        else:
            pieces.append(call)
        return True

    def _step_header(self, pieces: list[Piece]) -> bool:
        stop = self._text.find(MESSAGE)
        if 0 <= stop <= MAX_HEADER_CHARS:
            header, self._text = self._text[:stop], self._text[stop + len(MESSAGE) :]
            self._begin(header)
            return True
        if stop < 0 and len(self._text) <= MAX_HEADER_CHARS + len(MESSAGE):
            return False
        self._begin("")
        return True

    def _begin(self, header: str) -> None:
        self._header, self._in_header, self._is_first = header, False, True
        channel = header.partition(CHANNEL)[2].split("<|")[0].split()
        recipient = _RECIPIENT.search(header)
        if recipient is not None and recipient[1].startswith(FUNCTIONS):
            self._kind, self._name = "call", recipient[1].removeprefix(FUNCTIONS)
        else:
            self._kind = "reasoning" if channel[:1] == ["analysis"] else "content"

    def _call(self, body: str) -> ParsedCall | None:
        try:
            arguments: Any = read_json(body)
        except ValueError:
            return None
        return as_call(self._name, arguments)

    def _give_as_content(self, body: str, pieces: list[Piece]) -> None:
        self._kind = "content"
        self._give(f"{self._header}{MESSAGE}{body}", pieces)

    def _give(self, text: str, pieces: list[Piece]) -> None:
        if not text:
            return
        if self._is_first and self._kind in self._begun:
            text = "\n\n" + text
        self._is_first = False
        self._begun.add(self._kind)
        pieces.append(Thought(text) if self._kind == "reasoning" else text)
