"""Tools of the Responses API that are no plain functions, as functions and back.

    function           as it is
    namespace          its functions, each as `namespace__name`
    custom             a function of one string, `input`; a grammar is told, not enforced
    local_shell        a function `local_shell` with `command`, `working_directory`, `timeout_ms`

What runs on OpenAI's side (web search, file search, ...) is refused by name: nobody here runs it.
`Tools` knows how each was declared, and turns the calls of both sides into one another.
"""

from __future__ import annotations

from typing import Any

import orjson

from areal_sub.proxy.dialects import fields
from areal_sub.proxy.neutral import ToolCall
from areal_sub.proxy.refusals import invalid

LOCAL_SHELL = "local_shell"
_SEPARATOR = "__"
_OF_MODELS = ("apply_patch", "computer", "computer_use_preview", "shell")  # agents run them
_CUSTOM = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
}
_SHELL = {
    "name": LOCAL_SHELL,
    "description": "Runs a command on the local machine and returns its output.",
    "parameters": {
        "type": "object",
        "properties": {
            "command": {"type": "array", "items": {"type": "string"}},
            "working_directory": {"type": "string"},
            "timeout_ms": {"type": "integer"},
        },
        "required": ["command"],
    },
}


class Tools:
    def __init__(self, body: fields.Body) -> None:
        self.shown: list[dict[str, Any]] = []  # in the neutral form
        self.strict: set[str] = set()
        self._custom: set[str] = set()
        self._spaces: dict[str, tuple[str, str]] = {}  # shown name → (namespace, name)
        self._has_shell = False
        for index, value in enumerate(fields.items(body, "tools", at_most=fields.MAX_TOOLS)):
            where = f"tools[{index}]"
            tool = fields.as_mapping(value, where)
            if tool.get("type") == "namespace":
                self._add_namespace(tool, where)
            else:
                self._add(tool, where, "")

    def item(self, call: ToolCall, item_id: str, status: str) -> dict[str, Any]:
        """The output item that a sampled call is."""
        arguments = call.parsed_arguments()
        space, name = self._spaces.get(call.name, ("", call.name))
        item: dict[str, Any] = {"id": item_id, "call_id": call.id, "status": status}
        if space:
            item["namespace"] = space
        if call.name in self._custom:
            text = arguments.get("input") if isinstance(arguments, dict) else None
            exact = isinstance(text, str) and len(arguments) == 1
            text = text if exact else call.arguments
            return {"type": "custom_tool_call", "name": name, "input": text, **item}
        if self._has_shell and call.name == LOCAL_SHELL and _is_command(arguments):
            action = {"type": "exec", "env": {}, **arguments}
            return {"type": "local_shell_call", "action": action, **item}
        return {"type": "function_call", "name": name, "arguments": call.arguments, **item}

    def _add_namespace(self, space: fields.Body, where: str) -> None:
        name = fields.name(space, "name", where=where + ".")
        tools = fields.items(space, "tools", where=where + ".", at_most=fields.MAX_TOOLS)
        for index, value in enumerate(tools):
            at = f"{where}.tools[{index}]"
            self._add(fields.as_mapping(value, at), at, name)

    def _add(self, tool: fields.Body, where: str, space: str) -> None:
        kind = tool.get("type")
        if kind == LOCAL_SHELL and not space:
            self._has_shell = True
            self.shown.append({"type": "function", "function": _SHELL})
            return
        if kind not in ("function", "custom"):
            why = (
                "is one that only OpenAI's models know"
                if kind in _OF_MODELS
                else "would have to run on OpenAI's side, and nobody runs it here"
            )
            raise invalid(
                f"{where}.type: the tool {kind!r} {why}. Switch it off, or give a function "
                "instead.",
                f"{where}.type",
            )
        name = fields.name(tool, "name", where=where + ".")
        as_shown = shown_name(space, name)
        if space:
            self._spaces[as_shown] = (space, name)
        parameters = tool.get("parameters")
        if kind == "custom":
            self._custom.add(as_shown)
            parameters = _CUSTOM
        function = {
            "name": as_shown,
            "description": _description(tool),
            "parameters": parameters,
            "strict": tool.get("strict"),
        }
        shown, strict = fields.tool(function, where)
        self.shown.append(shown)
        if strict:
            self.strict.add(as_shown)


def shown_name(namespace: str, name: str) -> str:
    return f"{namespace}{_SEPARATOR}{name}" if namespace else name


def _description(tool: fields.Body) -> Any:
    told = tool.get("description")
    form = tool.get("format")
    if isinstance(form, dict) and form.get("type") == "grammar":
        told = f"{told or ''}\nThe input must match this {form.get('syntax')} grammar:\n"
        told += str(form.get("definition"))
    return told


def _is_command(arguments: Any) -> bool:
    if not isinstance(arguments, dict) or not arguments.keys() <= _SHELL_KEYS:
        return False
    command = arguments.get("command")
    return isinstance(command, list) and all(isinstance(word, str) for word in command)


_SHELL_KEYS = {"command", "working_directory", "timeout_ms"}


def custom_arguments(text: str) -> str:
    return orjson.dumps({"input": text}).decode()


def shell_arguments(action: fields.Body) -> str:
    given = {key: action[key] for key in sorted(_SHELL_KEYS) if action.get(key) is not None}
    return orjson.dumps(given).decode()
