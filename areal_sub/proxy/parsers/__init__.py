"""Tool-call parsers: how a model writes calls into its text, by name.

A parser is made per choice, fed decoded text as it comes and says what of it is content and what a
call. Text that may still turn out to be a call is held back; a malformed call is content. To add
one: a file here with a class like `HermesParser`, and its names in `_PARSERS`.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

from areal_sub.errors import ConfigError
from areal_sub.proxy.parsers.hermes import HermesParser
from areal_sub.proxy.parsers.pieces import CallSyntax, ParsedCall, Piece, Tag

__all__ = [
    "CallSyntax",
    "ParsedCall",
    "Piece",
    "Tag",
    "ToolCallParser",
    "parser_for",
    "parser_names",
]


class ToolCallParser(Protocol):
    """`feed` text; then `finish` once. Pieces come in the order of the text."""

    TAGS: ClassVar[tuple[str, ...]]  # texts that must reach `feed` even where they are tokens
    SYNTAX: ClassVar[CallSyntax]

    def feed(self, text: str) -> list[Piece]: ...

    def finish(self) -> list[Piece]: ...


# AReaL's (and SGLang's) names for the same format are accepted.
_PARSERS: dict[str, type[ToolCallParser]] = dict.fromkeys(
    ("hermes", "qwen", "qwen25", "qwen2_5", "qwen3"), HermesParser
)


def parser_names() -> list[str]:
    return list(_PARSERS)


def parser_for(name: str) -> type[ToolCallParser]:
    """Raises `ConfigError` naming the parsers that there are."""
    try:
        return _PARSERS[name]
    except KeyError:
        raise ConfigError(
            f"rollout.openai.tool_call_parser: no parser {name!r}; there are: {', '.join(_PARSERS)}"
        ) from None
