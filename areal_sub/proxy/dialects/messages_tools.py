"""Tools of the Messages API, as functions.

    custom             as it is
    bash, text_editor, memory
                       by their version (`bash_20250124`): the agent runs them, and gives no schema,
                       as Anthropic's models know them. The policy is told.

What runs on Anthropic's side, or is answered with pictures, is refused by name.
"""

from __future__ import annotations

import re
from typing import Any

from areal_sub.proxy.dialects import fields
from areal_sub.proxy.refusals import invalid

_KNOWN = re.compile(r"(bash|text_editor|memory)_(\d{8})")
_DESCRIPTIONS = {
    "bash": "Runs a command in a bash session that persists between calls, and gives its output.",
    "text_editor": "Views, creates and edits text files.",
    "memory": "Views, creates and edits the files of a memory that outlasts the conversation.",
}
_TEXT, _LINE = {"type": "string"}, {"type": "integer"}
_RANGE = {"type": "array", "items": _LINE, "minItems": 2, "maxItems": 2}
_BASH = {"command": _TEXT, "restart": {"type": "boolean"}}
_FILES = {
    "path": _TEXT,
    "file_text": _TEXT,
    "old_str": _TEXT,
    "new_str": _TEXT,
    "insert_line": _LINE,
    "view_range": _RANGE,
}
_COMMANDS = ["view", "create", "str_replace", "insert"]


def tool(value: Any, where: str) -> tuple[dict[str, Any], bool]:
    """`value` in the neutral form; and whether its schema is strict."""
    given = fields.as_mapping(value, where)
    kind = given.get("type")
    known = _KNOWN.fullmatch(kind) if isinstance(kind, str) else None
    if known is None and kind not in (None, "custom"):
        raise invalid(
            f"{where}.type: {kind!r} is a tool that runs on Anthropic's side, or that the policy "
            "does not know; give a tool with a name and an input_schema instead.",
            f"{where}.type",
        )
    described = {
        "description": given.get("description"),
        "parameters": fields.mapping(given, "input_schema", where=where + "."),
    }
    if known is not None:
        name, version = known.groups()
        described = {"description": _DESCRIPTIONS[name], "parameters": _schema(name, version)}
    function = {"name": given.get("name"), **described, "strict": given.get("strict")}
    return fields.tool(function, where)


def _schema(name: str, version: str) -> dict[str, Any]:
    if name == "bash":
        return {"type": "object", "properties": _BASH}
    commands, properties = list(_COMMANDS), dict(_FILES)
    if name == "memory":
        commands += ["delete", "rename"]
        properties |= {"old_path": _TEXT, "new_path": _TEXT}
    elif version < "20250429":
        commands.append("undo_edit")
    if name == "memory" or version >= "20250429":  # before, `new_str` is what is inserted
        properties["insert_text"] = _TEXT
    properties = {"command": {"type": "string", "enum": commands}, **properties}
    required = ["command"] if name == "memory" else ["command", "path"]
    return {"type": "object", "properties": properties, "required": required}
