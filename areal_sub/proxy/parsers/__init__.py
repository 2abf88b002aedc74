"""How a model writes tool calls and reasoning into its text: parsers by name.

A parser is made per choice, fed decoded text as it comes and says what of it is content and what a
call, or reasoning. Text that may still turn out to be a call is held back; a malformed call is
content. To add one: a file here with a class like `HermesParser` or `ThinkParser`, and its names in
`_PARSERS` or `_REASONING_PARSERS`.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

from areal_sub.errors import ConfigError
from areal_sub.proxy.parsers.hermes import HermesParser
from areal_sub.proxy.parsers.pieces import CallSyntax, ParsedCall, Piece, Tag
from areal_sub.proxy.parsers.think import ThinkParser

__all__ = [
    "CallSyntax",
    "ParsedCall",
    "Piece",
    "Tag",
    "ThinkParser",
    "ToolCallParser",
    "parser_for",
    "parser_names",
    "reasoning_parser_for",
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

_REASONING_PARSERS: dict[str, type[ThinkParser] | None] = {
    "none": None,
    **dict.fromkeys(("think", "qwen3", "qwen3-thinking", "deepseek-r1"), ThinkParser),
}


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


def reasoning_parser_for(name: str) -> type[ThinkParser] | None:
    """None: reasoning stays in the text. Raises `ConfigError` naming the parsers that there are."""
    try:
        return _REASONING_PARSERS[name]
    except KeyError:
        raise ConfigError(
            f"rollout.openai.reasoning_parser: no parser {name!r}; "
            f"there are: {', '.join(_REASONING_PARSERS)}"
        ) from None
