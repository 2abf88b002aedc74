"""The input of a Responses call: items of many types to messages."""

from __future__ import annotations

import base64
import binascii
from typing import Any

import orjson

from areal_sub.proxy.dialects import fields, responses_tools
from areal_sub.proxy.dialects.responses_tools import Tools
from areal_sub.proxy.dialects.transcript import Transcript
from areal_sub.proxy.kept import KeptAnswers
from areal_sub.proxy.neutral import Message, Role
from areal_sub.proxy.refusals import invalid

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
_TEXTS = ("input_text", "output_text", "text", "refusal")
# In front of what our answers hold as `encrypted_content`.
_SEAL = "areal-sub:"


def messages(body: fields.Body, tools: Tools, kept: KeptAnswers) -> tuple[Message, ...]:
    given = body.get("input")
    if isinstance(given, str):
        return (Message("user", given),)
    reader = _Reader(tools, kept)
    for index, item in enumerate(fields.items(body, "input", at_most=fields.MAX_MESSAGES)):
        reader.read(fields.as_mapping(item, f"input[{index}]"), f"input[{index}]")
    return reader.transcript.messages()


def sealed(reasoning: str) -> str:
    """For agents that may keep an answer's reasoning, but not read it."""
    return _SEAL + base64.b64encode(reasoning.encode()).decode()


class _Reader:
    def __init__(self, tools: Tools, kept: KeptAnswers) -> None:
        self.transcript = Transcript()
        self._tools = tools
        self._kept = kept
        self._after_text = False  # the last item was an assistant's message

    def read(self, item: fields.Body, where: str) -> None:
        kind = item.get("type") or ("message" if "role" in item else None)
        after_text, self._after_text = self._after_text, False
        if kind == "message":
            self._message(item, where, after_text)
        elif kind == "reasoning":
            self.transcript.think(_reasoning(item, where))
        elif kind in ("function_call", "custom_tool_call", "local_shell_call"):
            self._call(item, kind, where)
        elif kind in ("function_call_output", "custom_tool_call_output", "local_shell_call_output"):
            # A local shell's result names its call in `id`.
            call_id = _name(item, "call_id", where) or _name(item, "id", where)
            text = fields.joined(item.get("output"), where + ".output", _TEXTS)
            self.transcript.add(Message("tool", text, tool_call_id=call_id))
        elif kind == "item_reference":
            self.read(self._referred(item, where), where)
        else:
            raise invalid(
                f"{where}.type: {kind!r} is nothing that the policy can read.", f"{where}.type"
            )

    def _message(self, item: fields.Body, where: str, after_text: bool) -> None:
        role = _ROLES.get(fields.text(item, "role", where=where + ".", max_chars=32))
        if role is None:
            raise invalid(
                f"Invalid value for '{where}.role': use one of {', '.join(_ROLES)}.",
                f"{where}.role",
            )
        text = fields.joined(item.get("content"), where + ".content", _TEXTS)
        if role != "assistant":
            self.transcript.add(Message(role, text))
            return
        if after_text:
            self.transcript.close()
        self.transcript.say(text)
        self._after_text = True

    def _call(self, item: fields.Body, kind: str, where: str) -> None:
        call_id = _name(item, "call_id", where) or _name(item, "id", where)
        arguments: Any
        if kind == "local_shell_call":
            action = fields.mapping(item, "action", where=where + ".")
            name, arguments = responses_tools.LOCAL_SHELL, responses_tools.shell_arguments(action)
        else:
            name = fields.name(item, "name", where=where + ".")
            name = self._tools.shown_name(_name(item, "namespace", where), name)
            arguments = item.get("arguments")
        if kind == "custom_tool_call":
            written = fields.text(item, "input", where=where, max_chars=fields.MAX_TEXT_CHARS)
            arguments = responses_tools.custom_arguments(written)
        call = fields.tool_call(call_id, name, arguments, where + ".arguments")
        self.transcript.call(call, where)

    def _referred(self, item: fields.Body, where: str) -> dict[str, Any]:
        item_id = _name(item, "id", where)
        parts = item_id.split("_")  # kind, its answer, number
        kept = self._kept.get(f"resp_{parts[1]}") if len(parts) > 1 else None
        for output in orjson.loads(kept.body)["output"] if kept else ():
            if output["id"] == item_id:
                return dict(output)
        raise invalid(f"Item with id '{item_id}' not found.", f"{where}.id")


def _name(item: fields.Body, key: str, where: str) -> str:
    return fields.text(item, key, where=where + ".", max_chars=fields.MAX_NAME_CHARS)


def _reasoning(item: fields.Body, where: str) -> str:
    """What was thought, from where it can be read; a summary is something else."""
    parts = item.get("content")
    if parts:
        return fields.joined(parts, where + ".content", ("reasoning_text", "text"))
    text = fields.text(
        item, "encrypted_content", where=where + ".", max_chars=2 * fields.MAX_TEXT_CHARS
    )
    try:
        return base64.b64decode(text.removeprefix(_SEAL), validate=True).decode() * (
            text.startswith(_SEAL)
        )
    except (binascii.Error, UnicodeDecodeError):
        return ""  # another provider's
