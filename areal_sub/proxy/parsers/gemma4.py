"""Gemma 4's calls and thinking.

    <|channel>thought
    What is 7 * 8? …
    <channel|><|tool_call>call:calc{a:7,op:<|"|>*<|"|>}<tool_call|>

After its calls the model opens `<|tool_response>`, which is why that ends its turn.
"""

from __future__ import annotations

from typing import ClassVar

from areal_sub.proxy.parsers.calls import as_call
from areal_sub.proxy.parsers.literals import GemmaReader
from areal_sub.proxy.parsers.pieces import ParsedCall
from areal_sub.proxy.parsers.tagged import TaggedParser
from areal_sub.proxy.parsers.think import ThinkParser


class Gemma4Parser(TaggedParser):
    OPEN: ClassVar[str] = "<|tool_call>"
    CLOSE: ClassVar[str] = "<tool_call|>"
    TAGS: ClassVar[tuple[str, ...]] = (OPEN, CLOSE, GemmaReader.QUOTE)

    def calls(self, body: str) -> list[ParsedCall]:
        head, opened, rest = body.partition("{")
        name = head.strip().removeprefix("call:")
        if not opened or name == head.strip():
            return []
        reader = GemmaReader(rest)
        try:
            arguments = reader.fields("}", ":")
        except ValueError:
            return []
        call = as_call(name, arguments) if reader.at_end() else None
        return [call] if call else []


class Gemma4ThinkParser(ThinkParser):
    OPEN: ClassVar[str] = "<|channel>thought"
    CLOSE: ClassVar[str] = "<channel|>"
    TAGS: ClassVar[tuple[str, ...]] = ("<|channel>", CLOSE)
