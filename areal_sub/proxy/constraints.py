"""What an answer has to look like, as a grammar for the engine.

From the neutral description (tool choice, output format, tools) to the text of
`GenerateRequest.grammar`; pure. The answer format says how calls are written (`CallSyntax`), the
vocabulary which of its tags are tokens. Called by `turns.py`.

    tool choice    output format   the answer is
    required       any             one call or more (exactly one without parallel calls)
    auto           JSON            one JSON text, or calls where there are tools
    none           JSON            one JSON text
    auto, named    text            any text, and calls of the named tools only
    auto, none     text            anything: no grammar

Where a reasoning parser is configured, thinking may come before it.

JSON is what the schema allows, in the schema's order of properties, with one space, or a new line
and its indentation, wherever JSON may have white space. Of a schema that is strict, a keyword that
cannot be held to refuses the call; else it is ignored (OpenAI's "best effort"). Tools that the
model calls of its own accord are not constrained, strict or not: it is to learn how to call them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from areal_sub.proxy.families import AnswerFormat
from areal_sub.proxy.neutral import Call
from areal_sub.proxy.parsers import CallSyntax, Tag
from areal_sub.proxy.refusals import Refusal, invalid

# Some large tool sets' schemas, several times over; compiling is bounded by the engine.
MAX_GRAMMAR_CHARS = 2**20
# Models that indent are not made to write densely, and none can fill its answer with white space.
WHITE_SPACE = r"( |\n[ \t]{0,24})"
# RFC 8259, section 6: what every JSON reader takes for the same integer. The engine's is one that
# takes larger ones for the nearest double, and would write that.
MAX_EXACT_INTEGER = 2**53
ANY_TEXT = r"/(.|\n)*/"


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The model may think first, between these tags; what it thinks is not constrained."""

    opened: str
    closed: str
    begun: bool  # the prompt ends with `opened`


def grammar_of(
    call: Call,
    answer_format: AnswerFormat,
    control_ids: Mapping[str, int],
    reasoning: Reasoning | None = None,
) -> str:
    """Empty where the answer may be anything. Raises `Refusal` naming the field."""
    choice, wants_json = call.tool_choice, call.output_format.kind != "text"
    tools = {tool["function"]["name"]: tool["function"] for tool in call.tools}
    if choice.mode == "required" and not tools:
        raise invalid("tool_choice asks for a tool call, but there are no tools.", "tool_choice")
    if unknown := [name for name in choice.names if name not in tools]:
        raise invalid(
            f"tool_choice names {unknown[0]!r}, which is not among the tools.", "tool_choice"
        )
    _check_can_be_held(call, answer_format)
    syntax = answer_format.syntax
    calls = syntax and _Calls(
        call, [tools[name] for name in choice.names or tools], syntax, control_ids
    )
    if wants_json and choice.mode != "required":
        rules = ["answer: json", f"json: {_json(call)}"]
        if calls and tools and choice.mode == "auto":
            rules = ["answer: json | calls", rules[1], *calls.rules()]
    elif calls and choice.mode == "required":
        rules = ["answer: calls", *calls.rules()]
    elif calls and choice.mode == "auto" and choice.names:
        if not calls.begin_with_token:
            raise invalid(
                "tool_choice cannot restrict which tools an answer may call where this model "
                "writes calls as text: use 'required', or give only those tools.",
                "tool_choice",
            )
        rules = ["answer: TEXT (call TEXT)*", *calls.rules()]
    else:
        return ""
    grammar = "\n".join([*_beginning(reasoning, control_ids), *rules])
    if len(grammar) > MAX_GRAMMAR_CHARS:
        raise invalid(
            f"The schemas that the answer has to keep to are larger than {MAX_GRAMMAR_CHARS} "
            "characters together.",
            described_in(call),
        )
    return grammar


def _check_can_be_held(call: Call, answer_format: AnswerFormat) -> None:
    """Raises `Refusal` where the call asks for what this format cannot be held to."""
    choice, wants_json = call.tool_choice, call.output_format.kind != "text"
    held = "this model's answers cannot be held to one"
    if wants_json and answer_format.is_harmony:
        raise invalid(f"An output format: {held} ({answer_format.name}).", "response_format")
    may_call = choice.mode == "auto" and bool(call.tools)
    if answer_format.syntax is None and (
        choice.mode == "required" or (may_call and (wants_json or choice.names))
    ):
        raise invalid(
            f"tool_choice: how this model writes its calls ({answer_format.name}) cannot be "
            "forced; it may be 'none', or 'auto' without an output format.",
            "tool_choice",
        )


def described_in(call: Call) -> str:
    """The field that a fault of the call's grammar is a fault of."""
    return "tools" if call.tool_choice.mode == "required" else "response_format"


def refused(call: Call, reason: str) -> Refusal:
    """The engine cannot hold the answer to the call's grammar."""
    where = described_in(call)
    return invalid(f"{where}: the answer cannot be held to this schema: {reason}", where)


class _Calls:
    def __init__(
        self,
        call: Call,
        tools: Iterable[Mapping[str, Any]],
        syntax: CallSyntax,
        control_ids: Mapping[str, int],
    ) -> None:
        self._call = call
        self._tools = list(tools)
        self._syntax = syntax
        self._control_ids = control_ids

    @property
    def begin_with_token(self) -> bool:
        first = self._syntax.before("")[0]
        return isinstance(first, Tag) and first in self._control_ids

    def rules(self) -> list[str]:
        """Of `calls` and `call`."""
        more = f" ({self._terms(self._syntax.between)} call)*" if self._several else ""
        names = " | ".join(f"call{i}" for i in range(len(self._tools)))
        rules = [f"calls: call{more}", f"call: {names}"]
        for i, tool in enumerate(self._tools):
            before = self._terms(self._syntax.before(tool["name"]))
            rules += [
                f"call{i}: {before} arguments{i} {self._terms(self._syntax.after)}",
                f"arguments{i}: {self._arguments(tool)}",
            ]
        return rules

    @property
    def _several(self) -> bool:
        return self._call.parallel_tool_calls

    def _arguments(self, tool: Mapping[str, Any]) -> str:
        given = tool.get("parameters")
        if given is None:
            given = {"properties": {}, "additionalProperties": False}
        if not isinstance(given, dict):
            raise invalid(f"The parameters of the tool {tool['name']!r} must be a schema.", "tools")
        _check_values(given, "tools")
        strict = tool["name"] in self._call.strict_tools
        return _term({**given, "type": "object"}, strict=strict)

    def _terms(self, parts: Iterable[str]) -> str:
        return " ".join(
            f"<[{self._control_ids[part]}]>"
            if isinstance(part, Tag) and part in self._control_ids
            else _quoted(part)
            for part in parts
        )


def _quoted(text: str) -> str:
    # As JSON, but for one character that grammars cannot hold bare.
    return json.dumps(text).replace("\x7f", "\\u007f")


def _beginning(reasoning: Reasoning | None, control_ids: Mapping[str, int]) -> list[str]:
    rules = [f"TEXT: {ANY_TEXT}", "start: answer"]
    if reasoning is None:
        return rules
    closed = control_ids.get(reasoning.closed)
    if closed is not None:
        rules.append(f"thought: TEXT <[{closed}]>")
    else:
        rules.append(f"thought[lazy]: TEXT {_quoted(reasoning.closed)}")
    if reasoning.begun:
        rules[1] = "start: thought SPACE answer"
    else:
        opened = control_ids.get(reasoning.opened)
        term = _quoted(reasoning.opened) if opened is None else f"<[{opened}]>"
        rules[1] = f"start: answer | {term} thought SPACE answer"
    return [*rules, r"SPACE: /[ \n]{0,4}/"]


def _json(call: Call) -> str:
    wanted = call.output_format
    if wanted.kind == "json_object":
        return _term({"type": "object"}, strict=True)
    _check_values(wanted.schema, "response_format")
    return _term(wanted.schema or {}, strict=wanted.strict)


def _check_values(schema: object, field: str) -> None:
    """Raises `Refusal` where a value that the answer may have is an integer that is not exact."""
    pending: list[tuple[object, bool]] = [(schema, False)]
    while pending:
        part, is_value = pending.pop()
        if isinstance(part, dict):
            pending += [(p, is_value or key in ("const", "enum")) for key, p in part.items()]
        elif isinstance(part, list):
            pending += [(p, is_value) for p in part]
        elif is_value and isinstance(part, int) and abs(part) > MAX_EXACT_INTEGER:
            raise invalid(
                f"{field}: the answer cannot be held to {part}: integers beyond 2**53 are not "
                "exact in JSON. Let the schema have it as a string.",
                field,
            )


def _term(schema: Mapping[str, Any], *, strict: bool) -> str:
    # What the library reads from this key is ours to say, never the agent's.
    options = {"whitespace_pattern": WHITE_SPACE, "lenient": not strict}
    return "%json " + json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)
