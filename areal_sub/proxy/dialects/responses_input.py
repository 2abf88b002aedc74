"""The input of a Responses call: items of many types to messages."""

from __future__ import annotations

import base64
from typing import Any

import orjson

from areal_sub.proxy.dialects import Asked, fields, responses_tools
from areal_sub.proxy.dialects.transcript import Transcript
from areal_sub.proxy.kept import Kept, KeptAnswers
from areal_sub.proxy.neutral import Message, Role
from areal_sub.proxy.refusals import Refusal, invalid

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
_REFERENCE = "item_reference"
_TEXTS = ("input_text", "output_text", "text", "refusal")
# In front of what our answers hold as `encrypted_content`.
_SEAL = "areal-sub:"


def messages(body: fields.Body, asked: Asked) -> tuple[Message, ...]:
    given = body.get("input")
    if isinstance(given, str):
        return (Message("user", given),)
    items = fields.items(body, "input", at_most=fields.MAX_MESSAGES)
    for index, item in enumerate(items):
        if isinstance(item, dict) and item.get("type") == _REFERENCE:
            _answer_of(item, asked.kept, f"input[{index}]")  # it may be gone since it was read
    return asked.seen.read(items, _Reader(asked.kept))


def sealed(reasoning: str) -> str:
    """For agents that may keep an answer's reasoning, but not read it."""
    return _SEAL + base64.b64encode(reasoning.encode()).decode()


class _Reader(Transcript):
    def __init__(self, kept: KeptAnswers) -> None:
        super().__init__()
        self._kept = kept
        self._after_text = False  # the last item was an assistant's message, which is open

    def read(self, item: Any, index: int) -> None:
        where = f"input[{index}]"
        item = fields.as_mapping(item, where)
        if item.get("type") == _REFERENCE:
            item = _referred(item, self._kept, where)
        kind = item.get("type") or ("message" if "role" in item else None)
        after_text, self._after_text = self._after_text, False
        if kind == "message":
            self._message(item, where, after_text)
        elif kind == "reasoning":
            self.think(_reasoning(item, where))
        elif kind in ("function_call", "custom_tool_call", "local_shell_call"):
            self._call(item, kind, where)
        elif kind in ("function_call_output", "custom_tool_call_output", "local_shell_call_output"):
            # A local shell's result names its call in `id`.
            call_id = _name(item, "call_id", where) or _name(item, "id", where)
            text = fields.joined(item.get("output"), where + ".output", _TEXTS)
            self.add(Message("tool", text, tool_call_id=call_id))
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
            self.add(Message(role, text))
            return
        if after_text:
            self.close()
        self.say(text)
        self._after_text = True

    def _call(self, item: fields.Body, kind: str, where: str) -> None:
        call_id = _name(item, "call_id", where) or _name(item, "id", where)
        arguments: Any
        if kind == "local_shell_call":
            action = fields.mapping(item, "action", where=where + ".")
            name, arguments = responses_tools.LOCAL_SHELL, responses_tools.shell_arguments(action)
        else:
            name = fields.name(item, "name", where=where + ".")
            name = responses_tools.shown_name(_name(item, "namespace", where), name)
            arguments = item.get("arguments")
        if kind == "custom_tool_call":
            written = fields.text(item, "input", where=where, max_chars=fields.MAX_TEXT_CHARS)
            arguments = responses_tools.custom_arguments(written)
        call = fields.tool_call(call_id, name, arguments, where + ".arguments")
        self.call(call, where)


def _referred(item: fields.Body, kept: KeptAnswers, where: str) -> dict[str, Any]:
    """The item of an earlier answer that `item` names."""
    for output in orjson.loads(_answer_of(item, kept, where).body)["output"]:
        if output["id"] == item["id"]:
            return dict(output)
    raise _not_found(item, where)


def _answer_of(item: fields.Body, kept: KeptAnswers, where: str) -> Kept:
    _, _, rest = _name(item, "id", where).partition("_")  # kind, its answer, number
    answer = kept.get(f"resp_{rest.partition('_')[0]}")
    if answer is None:
        raise _not_found(item, where)
    return answer


def _not_found(item: fields.Body, where: str) -> Refusal:
    return invalid(f"Item with id '{_name(item, 'id', where)}' not found.", f"{where}.id")


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
    except ValueError:
        return ""  # another provider's
