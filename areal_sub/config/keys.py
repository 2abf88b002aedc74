"""What the schema says about each dotted key: its children, its type in plain words, its default.

Owns `ROOT`, the schema as a tree of `Key`s, and the search for the nearest right name. Read by the
loading (`source.py`, `load.py`) and by the reference table (`reference.py`). Pure.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import annotated_types
from pydantic_core import PydanticUndefined

from areal_sub.config import areal
from areal_sub.config.schema import Config, Section

# difflib ratios: "mod" ~ "mode" is 0.86; below FAR two names have little to do with one another.
NEAR, FAR = 0.75, 0.6


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the configuration, or its root (path "")."""

    path: str
    annotation: Any  # with its bounds, as `Annotated`
    default: Any  # `PydanticUndefined` where the key is required
    children: dict[str, Key] | None  # None: a value, not a section

    @property
    def required(self) -> bool:
        return self.default is PydanticUndefined

    @property
    def section(self) -> type[Section] | None:
        """The schema's class of this section; None for a value."""
        return _section(self.annotation)

    @property
    def nullable(self) -> bool:
        return accepts_null(self.annotation)

    @property
    def expected(self) -> str:
        """What may stand here, in plain words."""
        if self.children is None:
            return in_words(self.annotation)
        return "a section" + (" or null" if self.nullable else "")


def _key(path: str, annotation: Any, default: Any) -> Key:
    section = _section(annotation)
    if section is None:
        return Key(path, annotation, default, None)
    children = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        for bound in field.metadata:  # pydantic keeps the outermost `Annotated` apart
            kind = typing.Annotated[kind, bound]  # type: ignore[assignment]
        child_path = f"{path}.{name}" if path else name
        children[name] = _key(child_path, kind, field.get_default(call_default_factory=True))
    return Key(path, annotation, default, children)


def _section(annotation: Any) -> type[Section] | None:
    for kind in _alternatives(annotation):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; otherwise the annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def accepts_null(annotation: Any) -> bool:
    return annotation is Any or types.NoneType in _alternatives(annotation)


def wants_text(annotation: Any) -> bool:
    """True where text (or null) is the only thing that may stand here.

    There a bare word is taken as it was typed: `trial_name=2026` names the trial "2026".
    """
    kinds = [kind for kind in _alternatives(annotation) if kind is not types.NoneType]
    return all(
        kind is str
        or (
            typing.get_origin(kind) is Literal
            and all(isinstance(choice, str) for choice in typing.get_args(kind))
        )
        for kind in kinds
    )


def inside(annotation: Any, name: str = "") -> Any:
    """The annotation of what a list or a map holds, or a section at `name`; `Any` where the schema
    does not say."""
    for kind in _alternatives(annotation):
        if typing.get_origin(kind) in (list, dict):
            return typing.get_args(kind)[-1]
        if (field := fields_of(kind).get(name)) is not None:
            return field
    return Any


def fields_of(annotation: Any) -> dict[str, Any]:
    """Name → annotation of a section's keys; empty for what is none."""
    section = _section(annotation)
    return {} if section is None else dict(typing.get_type_hints(section, include_extras=True))


def takes_map(annotation: Any) -> bool:
    """True where a map may stand whose keys the schema does not know."""
    return annotation is Any or any(
        typing.get_origin(kind) is dict for kind in _alternatives(annotation)
    )


def choices(annotation: Any) -> list[str]:
    """The words that a `Literal` allows; empty for other annotations."""
    return [
        str(choice)
        for kind in _alternatives(annotation)
        if typing.get_origin(kind) is Literal
        for choice in typing.get_args(kind)
    ]


def in_words(annotation: Any) -> str:
    """`Annotated[int, Gt(0)] | None` → "a whole number > 0, or null"."""
    kinds = _alternatives(annotation)
    words = " or ".join(_kind_in_words(kind) for kind in kinds if kind is not types.NoneType)
    return f"{words}, or null" if types.NoneType in kinds else words


def _kind_in_words(kind: Any) -> str:
    plain = {
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        Any: "anything",
    }
    if kind in plain:
        return plain[kind]
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        bounds = " and ".join(_bound_in_words(bound) for bound in _bounds(args[1:]))
        return f"{in_words(args[0])} {bounds}".rstrip()
    if _section(kind) is not None:
        return "a section"
    if origin is Literal:
        return args[0] if len(args) == 1 else "one of " + ", ".join(map(str, args))
    if origin is list:
        return f"a list ({in_words(args[0])} each)"
    if origin is dict:
        return f"a map ({in_words(args[1])} each)" if args[1] is not Any else "a map"
    raise TypeError(f"in_words() has no words for {kind!r}: give it some")


def _bounds(metadata: tuple[Any, ...]) -> Iterator[Any]:
    for item in metadata:
        # pydantic's `Field(gt=0)` inside a union is not unpacked into its bounds
        yield from getattr(item, "metadata", [item])


def _bound_in_words(bound: Any) -> str:
    match bound:
        case annotated_types.Gt(gt=limit):
            return f"> {limit}"
        case annotated_types.Ge(ge=limit):
            return f">= {limit}"
        case annotated_types.Lt(lt=limit):
            return f"< {limit}"
        case annotated_types.Le(le=limit):
            return f"<= {limit}"
    raise TypeError(f"in_words() has no words for {bound!r}: give it some")


ROOT = _key("", Config, PydanticUndefined)


def key_at(path: Sequence[str]) -> Key:
    """The key at `path`, or the last one on the way that the schema knows."""
    key = ROOT
    for part in path:
        if key.children is None or part not in key.children:
            break
        key = key.children[part]
    return key


def named_sections(key: Key) -> Key | None:
    """Of a map of sections: one of them, whatever its name; else None."""
    kind = inside(key.annotation)
    if key.children is not None or _section(kind) is None:
        return None
    return _key(f"{key.path}.NAME", kind, PydanticUndefined)


def _named_section(at: Key, parts: Sequence[str]) -> tuple[str, list[str], str] | None:
    """(path, its keys, the unknown name) where `parts` lead into a section of a map of sections."""
    if named_sections(at) is None:
        return None
    depth = len(at.path.split("."))
    annotation = at.annotation
    for index in range(depth, len(parts)):
        fields = fields_of(annotation)
        if fields and parts[index] not in fields:
            return ".".join(parts[:index]), list(fields), parts[index]
        annotation = inside(annotation, parts[index])
    return None


def all_keys(key: Key = ROOT) -> Iterator[Key]:
    """Every key below `key`, in the schema's order; a section stands before its children."""
    for child in (key.children or {}).values():
        yield child
        yield from all_keys(child)


def nearest(word: str, known: Iterable[str], cutoff: float = FAR) -> str | None:
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def unknown(path: str) -> str:
    """Why `path` is no key of the schema, and the nearest right name.

    `path` is unknown, or goes on below a value. In order: AReaL's own names, a near name at the
    same level, the same name at another level, a far name at the same level, a near full path.
    """
    parts = path.split(".")
    at = key_at(parts)
    if at.children is None and (named := _named_section(at, parts)) is not None:
        section, fields, wrong = named
        right = nearest(wrong, fields)
        todo = f"did you mean {right}?" if right else f"its keys are: {', '.join(fields)}"
        return f"there is no key {wrong!r} in {section}; {todo}"
    if at.children is None:
        return f"{at.path} is not a section but {at.expected}: it has no keys of its own"
    known = at.path.split(".") if at.path else []
    name, rest = parts[len(known)], parts[len(known) + 1 :]
    problem = f"there is no key {name!r}" + (f" in {at.path}" if at.path else "")
    here = ".".join([*known, name])
    if hint := areal.hint(here):
        return f"{problem}; {hint}"
    if new_name := areal.RENAMED.get(here):
        right = ".".join([new_name, *rest])
        return f"{problem}; AReaL's {here} is {new_name} here: did you mean {right}?"

    everywhere = [key.path for key in all_keys()]
    same_name = [other for other in everywhere if other.rpartition(".")[2] == parts[-1]]
    near = nearest(name, at.children, NEAR)
    if not near and not (elsewhere := nearest(path, same_name, cutoff=0.0)):
        near = nearest(name, at.children)
        elsewhere = nearest(path, everywhere)
    if near:
        right = ".".join([*known, near, *rest])
        return f"{problem}; did you mean {near}?" + (f" ({right})" if right != near else "")
    if elsewhere:
        return f"{problem}; did you mean {elsewhere}?"
    return f"{problem}; its keys are: {', '.join(at.children)}"
