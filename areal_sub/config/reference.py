"""The reference table of all keys, as Markdown: `docs/configuration.md` is what this prints.

Made from the schema alone (types, bounds, defaults, docstrings), so that it cannot disagree with
what is accepted. Called by `python -m areal_sub.config`; a test compares the file with it.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator, Sequence

from areal_sub.config import areal
from areal_sub.config.keys import ROOT, Key, all_keys, named_sections
from areal_sub.config.schema import Section

_HOW = """\
# Configuration

<!-- Printed by `python -m areal_sub.config`; `make docs` writes it here. -->

A run is configured by one YAML file and any number of overrides:

```
areal-sub train --config examples/proxy/config.yaml rollout.openai.mode=subproc seed=3
```

- **Overrides** are `a.b.c=value`. They go over the file, the later over the earlier. The value is
  YAML (`actor.optimizer.lr=1e-3`, `rollout.openai.python_path=[agents]`,
  `'rollout.openai.env={LANG: C}'`); where text is wanted it is taken as typed, so
  `trial_name=2026` needs no quotes. Empty (`a.b=`) is null.
- **Sections are merged** key by key. A list, or a map with keys of your own (`workflow_kwargs`,
  `rollout.openai.env`, `train_dataset.dataset_kwargs`), is replaced as a whole, unless an override
  names a key in it: `workflow_kwargs.style=terse`.
- **Interpolation.** `${actor.path}` is the value of another key, its default included;
  `${.path}` is a neighbour; `${oc.env:NAME,default}` is an environment variable, read as the key
  wants it (in a map of your own keys it stays text: `${oc.decode:${oc.env:NAME}}` reads it). All
  is resolved after the overrides. `\\${` is a plain `${`.
- **YAML** is read with YAML 1.2's plain types: only `true` and `false` are booleans, `1e-3` is a
  number, `no`, `010` and `12:30` are text. A key that is set twice is an error.
- **Types are strict.** A whole number may stand for a number; nothing else is converted.
- **All problems are reported at once**, each with its file and line, or its override, and the
  nearest right name.
- The resolved configuration is written with each run, and can be used as `--config` again.
"""

_AREAL = """\
## Coming from AReaL

Keys that mean the same have AReaL's names. These are named differently, or not needed:
"""


def reference() -> str:
    """The whole page."""
    parts = [_HOW, *_sections(ROOT, "Top level"), _AREAL]
    rows = [(f"`{old}`", f"is `{new}` here") for old, new in areal.RENAMED.items()]
    rows += [(f"`{pattern}`", text) for pattern, text in areal.HINTS.items()]
    return "\n".join([*parts, _table(("AReaL", "here"), rows)])


def _sections(key: Key, title: str) -> Iterator[str]:
    section = key.section
    assert section is not None and key.children is not None
    meanings = _field_docstrings(section)
    about = [_flat(section.__doc__)] if section.__doc__ and key is not ROOT else []
    rows = [
        (f"`{name}`", child.expected, _default(child), meanings.get(name, ""))
        for name, child in key.children.items()
    ]
    table = _table(("key", "value", "default", "meaning"), rows)
    yield "\n\n".join([f"## {title}", *about, table])
    for child in key.children.values():
        if child.section is not None and not _is_repeated(child):
            yield from _sections(child, f"`{child.path}`")
        elif (named := named_sections(child)) is not None:
            yield from _sections(named, f"`{named.path}`")


def _is_repeated(key: Key) -> bool:
    """True for a section whose keys the page has told under an earlier name (`eval_gconfig`)."""
    first = next(other for other in all_keys() if other.section is key.section)
    return first is not key


def _default(key: Key) -> str:
    if key.required:
        return "**required**"
    if key.children is not None and not key.nullable:
        return "see below"
    return f"`{json.dumps(key.default)}`"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def _field_docstrings(section: type[Section]) -> dict[str, str]:
    """Field name → the string that stands under it in the source."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(body, ast.ClassDef)
    meanings: dict[str, str] = {}
    field = ""
    for statement in body.body:
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name)):
                field = name
            case ast.Expr(value=ast.Constant(value=str(text))) if field:
                meanings[field] = _flat(text)
            case _:
                field = ""
    return meanings


def _flat(text: str) -> str:
    return " ".join(text.split())


def main() -> None:
    print(reference(), end="")  # noqa: T201 - this is what it is for
