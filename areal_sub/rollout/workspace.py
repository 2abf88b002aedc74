"""Which folder a rollout's files come from: `rollout.openai.sandbox.workspace`, with `{field}`s.

Pure. A task is data from anywhere: what it puts into the path has to be one plain name, so that no
task leads out of the folders that the configuration names.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from areal_sub.errors import TaskError


def workspace_of(template: str | None, data: Mapping[str, Any], base: Path) -> str:
    """The absolute folder for the task `data`; "" where there is no template.

    Raises `TaskError` naming the field that is not there, or is no plain name.
    """
    if template is None:
        return ""
    filled = ""
    for literal, field, _, _ in string.Formatter().parse(template):
        filled += literal
        if field is not None:
            filled += _plain_name(field, data, template)
    return str(base / filled)


def fixed_part(template: str, base: Path) -> Path:
    """The folder that holds all workspaces: as far as the path is the same for every task.

    `base` itself, or what is around it, where the template begins with a field.
    """
    kept: list[str] = []
    for part in Path(template).parts:
        if "{" in part.replace("{{", ""):
            break
        kept.append(part.replace("{{", "{").replace("}}", "}"))
    return (base / Path(*kept)).resolve()


def _plain_name(field: str, data: Mapping[str, Any], template: str) -> str:
    where = f"rollout.openai.sandbox.workspace={template}"
    if field not in data:
        raise TaskError(f"{where}: the task has no field {field!r}; it has {', '.join(data)}")
    value = data[field]
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TaskError(f"{where}: the task's {field!r} is {type(value).__name__}, not a name")
    name = str(value)
    if name in ("", ".", "..") or "/" in name or not name.isprintable():
        raise TaskError(f"{where}: the task's {field!r} is no plain name: {name[:100]!r}")
    return name
