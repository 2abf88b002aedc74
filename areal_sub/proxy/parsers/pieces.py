"""What parsers give, and what is said of how calls are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from areal_sub.proxy.neutral import Thought


@dataclass(frozen=True, slots=True)
class ParsedCall:
    name: str
    arguments: str  # JSON text of an object
    id: str = ""  # the model's own, where its format has one


Piece = str | Thought | ParsedCall  # content, reasoning, or a call


class Tag(str):
    """A text that is a control token wherever the vocabulary has it as one."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class CallSyntax:
    """How calls are written that stand alone in an answer, so that a grammar can force them."""

    before: Callable[[str], tuple[str, ...]]
    """A tool's name → what comes before the JSON text of the arguments; texts and `Tag`s."""
    after: tuple[str, ...]  # what comes behind it
    between: tuple[str, ...]  # between two calls
