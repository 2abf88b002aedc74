"""What a Gemini request holds: contents to messages, function declarations to tools."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import orjson

from areal_sub.proxy.dialects import fields
from areal_sub.proxy.dialects.transcript import Transcript
from areal_sub.proxy.neutral import Message
from areal_sub.proxy.refusals import invalid
from areal_sub.proxy.seen import Seen

MAX_UNANSWERED = fields.MAX_TOOL_CALLS
"""Calls that a result without an id may be of; looking for it takes time that is everybody's."""


def camel(value: Any, where: str) -> dict[str, Any]:
    """An object with its own keys (not those below) in camelCase, nulls left out."""
    body = fields.as_mapping(value, where)
    return {_camel_key(key): item for key, item in body.items() if item is not None}


def _camel_key(key: str) -> str:
    return re.sub("_([a-z])", lambda match: match[1].upper(), key)


def messages(body: fields.Body, seen: Seen) -> tuple[Message, ...]:
    before: tuple[Message, ...] = ()
    if (system := body.get("systemInstruction")) is not None:
        where = "systemInstruction"
        texts = [system] if isinstance(system, str) else _texts(system, where)
        if text := "".join(texts):
            before = (Message("system", text),)
    contents = fields.items(body, "contents", at_most=fields.MAX_MESSAGES)
    if not contents:
        raise invalid("at least one content is required", "contents")
    conversation = seen.read(contents, _Reader())
    if conversation and conversation[-1].role == "assistant":
        raise invalid("the last content must not be the model's.", "contents")
    return before + conversation


@dataclass(frozen=True, slots=True)
class _Calls:
    """A conversation's so far: results need not say which one they are of."""

    num: int = 0
    unanswered: tuple[tuple[str, str], ...] = ()
    """(name, id) of the last `MAX_UNANSWERED`."""


class _Reader(Transcript):
    def __init__(self) -> None:
        super().__init__()
        self.state = _Calls()

    def read(self, item: Any, index: int) -> None:
        where = f"contents[{index}]"
        content = camel(item, where)
        role = fields.text(content, "role", where=where + ".", max_chars=32, default="user")
        parts = fields.items(content, "parts", where=where + ".", at_most=fields.MAX_PARTS)
        if role == "model":
            # Agents keep a stream as it came, so neighbours are pieces of one answer.
            self.say("")
            for i, part in enumerate(parts):
                at = f"{where}.parts[{i}]"
                self._model_part(camel(part, at), at)
        elif role in ("user", "function"):
            self._user(parts, where)
        else:
            raise invalid("the role may be user or model.", f"{where}.role")

    def _model_part(self, part: fields.Body, where: str) -> None:
        if "functionCall" in part:
            at = where + ".functionCall"
            call = camel(part["functionCall"], at)
            name = fields.name(call, "name", where=at + ".")
            calls: _Calls = self.state
            call_id = _id(call, at) or f"call_{calls.num + 1}"
            unanswered = (*calls.unanswered, (name, call_id))[-MAX_UNANSWERED:]
            self.state = _Calls(calls.num + 1, unanswered)
            args = fields.mapping(call, "args", where=at + ".")
            self.call(fields.tool_call(call_id, name, args, at + ".args"), where)
        elif part.get("thought"):
            self.think(_part_text(part, where))
        else:
            self.say(_part_text(part, where))

    def _user(self, parts: list[Any], where: str) -> None:
        """Results of functions are messages of their own; the text between them is one."""
        texts: list[str] = []

        def say() -> None:
            if texts:
                self.add(Message("user", "".join(texts)))
                texts.clear()

        for index, value in enumerate(parts):
            at = f"{where}.parts[{index}]"
            part = camel(value, at)
            if "functionResponse" in part:
                say()
                self._result(camel(part["functionResponse"], at), at + ".functionResponse")
            else:
                texts.append(_part_text(part, at))
        say()

    def _result(self, result: fields.Body, where: str) -> None:
        name = fields.name(result, "name", where=where + ".")
        if result.get("parts"):
            raise invalid("the policy reads text only.", f"{where}.parts")
        call_id = _id(result, where)
        calls: _Calls = self.state
        for i, (called, its_id) in enumerate(calls.unanswered):
            if called == name and call_id in ("", its_id):
                call_id = its_id
                rest = calls.unanswered[:i] + calls.unanswered[i + 1 :]
                self.state = _Calls(calls.num, rest)
                break
        text = _result_text(fields.mapping(result, "response", where=where + "."))
        self.add(Message("tool", text, tool_call_id=call_id))


def _id(body: fields.Body, where: str) -> str:
    return fields.text(body, "id", where=where + ".", max_chars=fields.MAX_NAME_CHARS)


def _result_text(response: dict[str, Any]) -> str:
    """What a function gave: the only `output` (or `result`, as SDKs write), else all of it."""
    value: Any = response
    if len(response) == 1:
        value = response.get("output", response.get("result", response))
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def _texts(content: Any, where: str) -> list[str]:
    parts = fields.items(
        camel(content, where), "parts", where=where + ".", at_most=fields.MAX_PARTS
    )
    at = [f"{where}.parts[{index}]" for index in range(len(parts))]
    return [_part_text(camel(part, at), at) for part, at in zip(parts, at, strict=True)]


def _part_text(part: fields.Body, where: str) -> str:
    other = part.keys() - {"text", "thought", "thoughtSignature", "partMetadata"}
    if other:
        raise invalid(f"the policy reads text, not {min(other)}.", where)
    return fields.text(part, "text", where=where + ".", max_chars=fields.MAX_TEXT_CHARS)


def tools(body: fields.Body) -> tuple[tuple[dict[str, Any], ...], frozenset[str]]:
    """In the neutral form, and the names of the strict ones (Gemini marks none)."""
    shown = []
    for index, value in enumerate(fields.items(body, "tools", at_most=fields.MAX_TOOLS)):
        where = f"tools[{index}]"
        tool = camel(value, where)
        other = tool.keys() - {"functionDeclarations"}
        if other:
            raise invalid(
                f"{min(other)} would have to run on Google's side, and nobody runs it here. "
                "Switch it off, or give a function instead.",
                f"{where}.{min(other)}",
            )
        given = fields.items(
            tool, "functionDeclarations", where=where + ".", at_most=fields.MAX_TOOLS
        )
        for i, declaration in enumerate(given):
            shown.append(_tool(declaration, f"{where}.functionDeclarations[{i}]"))
    return tuple(shown), frozenset()


def _tool(value: Any, where: str) -> dict[str, Any]:
    declared = camel(value, where)
    parameters = declared.get("parametersJsonSchema")
    if parameters is None:
        parameters = json_schema(declared.get("parameters"))
    function = {
        "name": declared.get("name"),
        "description": declared.get("description"),
        "parameters": parameters,
    }
    return fields.tool(function, where)[0]


def json_schema(schema: Any, *, closed: bool = False) -> Any:
    """Google's form of a schema, whose types are in capitals, as a JSON schema.

    `closed`: objects have the properties that they list, and no others, as in answers of Google's.
    """
    if not isinstance(schema, dict):
        return schema
    out: dict[str, Any] = {}
    for given, value in schema.items():
        key = _camel_key(given)
        if value is None:
            continue
        if key == "type" and isinstance(value, str):
            out[key] = value.lower()
        elif key == "properties" and isinstance(value, dict):
            out[key] = {name: json_schema(item, closed=closed) for name, item in value.items()}
        elif key == "anyOf" and isinstance(value, list):
            out[key] = [json_schema(item, closed=closed) for item in value]
        else:
            out[key] = json_schema(value, closed=closed) if key == "items" else value
    if closed and out.get("properties"):
        out.setdefault("additionalProperties", False)
    return out
