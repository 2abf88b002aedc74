"""What parsers give."""

from __future__ import annotations

from dataclasses import dataclass

from areal_sub.proxy.neutral import Thought


@dataclass(frozen=True, slots=True)
class ParsedCall:
    name: str
    arguments: str  # JSON text of an object
    id: str = ""  # the model's own, where its format has one


Piece = str | Thought | ParsedCall  # content, reasoning, or a call
