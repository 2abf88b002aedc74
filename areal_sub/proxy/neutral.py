"""A model call and its answer in the one form that every dialect is translated to and from.

Pure data. Dialects (`dialects/`) make a `Call` from a request body and a body from `Choice`s or a
stream of `Delta`s; everything between knows only this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "tool_calls"]

# Of whatever JSON an agent sends or a model writes, so that nothing below recurses without bound.
MAX_DEPTH = 64


def is_deeper_than(value: Any, limit: int) -> bool:
    """Whether JSON `value` nests arrays and objects more than `limit` deep. Takes no stack."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(limit):
        if not level:
            return False
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ]
    return bool(level)


@dataclass(frozen=True, slots=True)
class ToolCall:
    id: str
    name: str
    arguments: str  # JSON text, as it was written

    def parsed_arguments(self) -> Any:
        """The arguments as an object, or their text where they are not JSON."""
        try:
            return orjson.loads(self.arguments)
        except orjson.JSONDecodeError:
            return self.arguments


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()  # assistant
    tool_call_id: str = ""  # tool
    name: str = ""
    reasoning: str = ""  # assistant: what it thought before it spoke


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`names`: the only tools that may be called; none: all of them."""

    mode: Literal["auto", "none", "required"] = "auto"
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OutputFormat:
    kind: Literal["text", "json_object", "json_schema"] = "text"
    schema: dict[str, Any] | None = None  # of "json_schema"
    name: str = ""
    strict: bool = True  # False: what of the schema cannot be held to is ignored


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What an agent asked for. None: it left it to us."""

    dialect: str
    model: str
    messages: tuple[Message, ...]
    raw_prompt: str | tuple[int, ...] | None = None  # text or token ids, instead of messages
    tools: tuple[dict[str, Any], ...] = ()  # in OpenAI's form: {"type": "function", "function": …}
    strict_tools: frozenset[str] = frozenset()  # names of those whose schema is to be kept to
    tool_choice: ToolChoice = ToolChoice()
    parallel_tool_calls: bool = True
    output_format: OutputFormat = OutputFormat()
    num_choices: int = 1
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False  # in a stream: a last chunk with the token counts
    logprobs: bool = False
    num_bytes: int = 0  # of the request's body
    retry: int = 0  # how often the client says to have made this very call before
    # What a later call goes on from by naming this one's answer; None: it cannot.
    conversation: tuple[Message, ...] | None = None
    echo: Mapping[str, Any] = field(default_factory=dict)  # the dialect's own, for its answers

    @property
    def parses_tool_calls(self) -> bool:
        return bool(self.tools) and self.tool_choice.mode != "none"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token: str
    logprob: float
    raw: bytes


@dataclass(frozen=True, slots=True)
class Thought:
    text: str


Part = Thought | str | ToolCall
_NOTHING: tuple[Part, ...] = ("", Thought(""))


@dataclass(slots=True)
class Choice:
    """One whole answer, or what there is of it. Neighbouring parts are of different kinds, except
    calls."""

    parts: list[Part] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_sequence: str | None = None  # the stop string that ended it

    def append(self, part: Part) -> None:
        last = self.parts[-1] if self.parts else None
        if isinstance(part, str) and isinstance(last, str):
            self.parts[-1] = last + part
        elif isinstance(part, Thought) and isinstance(last, Thought):
            self.parts[-1] = Thought(last.text + part.text)
        elif part not in _NOTHING:
            self.parts.append(part)

    def add(self, delta: Delta) -> None:
        """Go on with `delta`."""
        for part in delta.parts:
            self.append(part)
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason
        self.stop_sequence = delta.stop_sequence

    @property
    def reasoning(self) -> str:
        return "".join(part.text for part in self.parts if isinstance(part, Thought))

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def tool_calls(self) -> list[ToolCall]:
        return [part for part in self.parts if isinstance(part, ToolCall)]

    def message(self) -> Message:
        """As a later call should hold it."""
        return Message("assistant", self.text, tuple(self.tool_calls), reasoning=self.reasoning)


Delta = Choice  # a piece of a choice; its `logprobs` are those of all tokens since the last piece


@dataclass(frozen=True, slots=True)
class Usage:
    num_prompt_tokens: int
    num_sampled_tokens: int = 0  # of all choices
