"""How models write tool calls and reasoning into their text, one file per format.

A parser is made per choice, fed decoded text as it comes and says what of it is content, a call or
reasoning. Text that may still turn out to be a tag or a call is held back; a malformed call is
content; how the text is cut into pieces changes nothing. Which model writes which format is the
business of `families/`.
"""

from __future__ import annotations

from areal_sub.proxy.parsers.answer import AnswerParser, ToolCallParser, TwoPartParser
from areal_sub.proxy.parsers.pieces import CallSyntax, ParsedCall, Piece, Tag
from areal_sub.proxy.parsers.think import ThinkParser

__all__ = [
    "AnswerParser",
    "CallSyntax",
    "ParsedCall",
    "Piece",
    "Tag",
    "ThinkParser",
    "ToolCallParser",
    "TwoPartParser",
]
