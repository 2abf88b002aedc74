"""The XML format of Qwen3-Coder, Qwen3.5 and later, and Nemotron 3.

    <tool_call>
    <function=calc>
    <parameter=a>
    7
    </parameter>
    </function>
    </tool_call>

A value is the text between its tags, less one line break at either end. It says nothing about its
type, so the tool's schema decides: text for a string, JSON for everything else. A value that does
not fit its schema, or that no schema describes, is text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from areal_sub.proxy.parsers.calls import as_call, read_json
from areal_sub.proxy.parsers.pieces import ParsedCall
from areal_sub.proxy.parsers.tagged import TaggedParser

_TYPES: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
    "null": (type(None),),
}
# Models write Python's as often as JSON's.
_PYTHON = {"True": True, "False": False, "None": None}


class Qwen3CoderParser(TaggedParser):
    OPEN: ClassVar[str] = "<tool_call>"
    CLOSE: ClassVar[str] = "</tool_call>"
    TAGS: ClassVar[tuple[str, ...]] = (OPEN, CLOSE)

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__()
        self._tools = tools

    def calls(self, body: str) -> list[ParsedCall]:
        head, end, rest = body.strip().partition(">")
        if not (end and head.startswith("<function=") and rest.endswith("</function>")):
            return []
        name = head.removeprefix("<function=").strip()
        written = _parameters(rest.removesuffix("</function>"))
        if written is None:
            return []
        schemas = self._schemas(name)
        values = {key: _value(text, schemas.get(key)) for key, text in written.items()}
        call = as_call(name, values)
        return [call] if call else []

    def _schemas(self, name: str) -> Mapping[str, Any]:
        for tool in self._tools:
            function = tool.get("function")
            if isinstance(function, Mapping) and function.get("name") == name:
                parameters = function.get("parameters")
                found = parameters.get("properties") if isinstance(parameters, Mapping) else None
                return found if isinstance(found, Mapping) else {}
        return {}


def _parameters(text: str) -> dict[str, str] | None:
    """Values by name, or None where anything else is between them."""
    found: dict[str, str] = {}
    text = text.lstrip()
    while text:
        head, end, rest = text.partition(">")
        if not (end and head.startswith("<parameter=")):
            return None
        value, closed, rest = rest.partition("</parameter>")
        name = head.removeprefix("<parameter=").strip()
        if not closed or not name or name in found:
            return None
        found[name] = value.removeprefix("\n").removesuffix("\n")
        text = rest.lstrip()
    return found


def _value(text: str, schema: Any) -> Any:
    types = _types(schema)
    if types <= {"string"}:
        return text
    stripped = text.strip()
    try:
        value = _PYTHON[stripped] if stripped in _PYTHON else read_json(stripped)
    except ValueError:
        return text
    fits = any(
        isinstance(value, _TYPES.get(name, ())) and (name == "boolean") == isinstance(value, bool)
        for name in types
    )
    return value if fits else text


def _types(schema: Any) -> set[str]:
    """Names of the types that `schema` allows; none where it does not say."""
    if not isinstance(schema, Mapping):
        return set()
    named = schema.get("type")
    listed = named if isinstance(named, list) else [named]
    types = {name for name in listed if isinstance(name, str)}
    for key in ("anyOf", "oneOf"):
        if isinstance(choices := schema.get(key), list):
            # A schema may nest without end; a choice among choices says nothing to us.
            types |= {
                choice["type"]
                for choice in choices
                if isinstance(choice, Mapping) and isinstance(choice.get("type"), str)
            }
    return types
