"""YAML files and `a.b.c=value` overrides, read into settings that know where they came from.

Owns the YAML dialect (YAML 1.2's core types: only `true` and `false` are booleans, `1e-3` is a
number, `12:30` and `010` are text) and the flattening of nested sections into one `Setting` per
value. Whatever is wrong comes out as a `Problem` beside the settings, so that one reading finds
all of it. Called by `load.py`; knows nothing of interpolation or bounds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from areal_sub.config.keys import (
    ROOT,
    Key,
    fields_of,
    inside,
    takes_map,
    unknown,
    wants_text,
)

Path = tuple[str, ...]

_TAG = "tag:yaml.org,2002:"
_RESOLVERS = [  # tag, what a plain scalar of that type looks like, its possible first characters
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - yaml's own name for it


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        # yaml.add_implicit_resolver copies the table on first use, so the two stay independent
        _class.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), _first)


@dataclass(frozen=True, slots=True)
class Setting:
    """One value for one key. A section that is merely opened has the value `{}`."""

    path: Path
    value: Any  # plain Python; text may still hold `${...}`
    origin: str  # "config.yaml:12", "override 'a.b=1'"


@dataclass(frozen=True, slots=True)
class Problem:
    path: str  # dotted; "" where it is about a file or an override as a whole
    origin: str
    text: str

    def __str__(self) -> str:
        path = "" if self.origin.startswith(f"override '{self.path}=") else self.path
        return ": ".join(part for part in (self.origin, path, self.text) if part)


Found = Setting | Problem


class FileProblem(Problem):
    """None of the file's settings could be read: what it would have set is not known to be missing.

    `path` is "".
    """


class _Unreadable(Exception):
    """A value that is YAML, but none that a configuration can hold."""


def read_yaml(text: str, name: str) -> Iterator[Found]:
    """The settings of one YAML document; `name` stands for it in origins."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        yield FileProblem("", f"{name}:{_line(error)}", f"this is not YAML: {_reason(error)}")
        return
    except yaml.YAMLError as error:
        yield FileProblem("", name, f"this is not YAML: {error}")
        return
    if node is None or _is(node, "null"):
        yield FileProblem(
            "", name, "is empty; it needs at least experiment_name, trial_name, actor"
        )
    elif not isinstance(node, MappingNode):
        got = "a list" if isinstance(node, SequenceNode) else "a single value"
        text = f"must be a map of keys to values at the top level; this is {got}"
        yield FileProblem("", name, text)
    else:
        try:
            yield from _walk(node, ROOT, (), name, lambda at: f"{name}:{at.start_mark.line + 1}")
        except RecursionError:
            yield FileProblem("", name, "an anchor (&) holds an alias (*) to itself")


def read_override(text: str) -> Iterator[Found]:
    """The settings of one `a.b.c=value`."""
    origin = f"override {text!r}"
    name, equals, raw = text.partition("=")
    if not equals or not name:
        yield Problem("", origin, "write it as key=value, with a dotted key: rollout.timeout_s=60")
        return
    if not name[0].isalpha():
        bare = name.lstrip("-+~")
        yield Problem("", origin, f"overrides have no {name[0]!r} in front: write {bare}={raw}")
        return
    path, key, annotation = tuple(name.split(".")), ROOT, Any
    for depth, part in enumerate(path):
        if key.children is not None and part in key.children:
            key = key.children[part]
            annotation = key.annotation
        elif key.children is None and part in fields_of(annotation):
            annotation = inside(annotation, part)
        elif key.children is None and takes_map(annotation) and all(path[depth:]):
            annotation = inside(annotation)
        else:
            yield Problem(name, origin, unknown(name))
            return
    try:
        node = yaml.compose(raw, Loader=_Loader)
    except yaml.YAMLError as error:
        if not wants_text(annotation):
            reason = _reason(error) if isinstance(error, yaml.MarkedYAMLError) else str(error)
            yield Problem(name, origin, f"the value is not YAML: {reason}")
            return
        node = None
    if wants_text(annotation) and not (_is(node, "null") or _is_quoted(node)):
        # where text is wanted it is taken as typed: "#", ":" and "[" have no meaning there
        yield Setting(path, raw or None, origin)
    elif key.children is not None:
        if node is None and key.nullable:
            yield Setting(path, None, origin)
        elif node is None:
            yield _no_section(key, path, None, origin)
        else:
            yield from _walk(node, key, path, origin, lambda _: origin)
    elif node is None:
        yield Setting(path, None, origin)
    else:
        try:
            yield Setting(path, _construct(node, annotation), origin)
        except _Unreadable as error:
            yield Problem(name, origin, str(error))


def read_map(values: Mapping[str, Any], origin: str) -> Iterator[Found]:
    """The settings of a nested Python map."""
    yield from _walk_map(values, ROOT, (), origin)


def _walk_map(values: Mapping[str, Any], key: Key, path: Path, origin: str) -> Iterator[Found]:
    assert key.children is not None
    yield Setting(path, {}, origin)
    for name, value in values.items():
        here = (*path, str(name))
        child = key.children.get(str(name))
        if child is None:
            yield Problem(".".join(here), origin, unknown(".".join(here)))
        elif child.children is not None and isinstance(value, Mapping):
            yield from _walk_map(value, child, here, origin)
        else:
            yield Setting(here, value, origin)


def read_scalar(text: str, annotation: Any) -> Any:
    """`text` as a plain YAML scalar, read as the schema wants it there; else `text` itself."""
    if wants_text(annotation):
        return text
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError:
        return text
    if not isinstance(node, ScalarNode) or _is(node, "str"):
        return text
    return _construct(node, annotation)


def write_yaml(values: Mapping[str, Any]) -> str:
    """`values` in this dialect. Raises `yaml.YAMLError` where they are not plain data."""
    text: str = yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def _walk(
    node: Node, key: Key, path: Path, origin: str, origin_of: Callable[[Node], str]
) -> Iterator[Found]:
    """Settings of the YAML `node` that stands at `key`; `origin_of(node)` says where a node is."""
    dotted = ".".join(path)
    try:
        if key.children is None:
            yield Setting(path, _construct(node, key.annotation), origin)
            return
        if not isinstance(node, MappingNode):
            yield from _instead_of_section(node, key, path, origin)
            return
        yield Setting(path, {}, origin)
        seen: dict[str, str] = {}
        for name, name_node, value in _pairs(node):
            here, at = ".".join((*path, name)), origin_of(name_node)
            if name in seen:
                yield Problem(here, at, f"set twice; the first time at {seen[name]}")
                continue
            seen[name] = at
            if name not in key.children:
                yield Problem(here, at, unknown(here))
                continue
            yield from _walk(value, key.children[name], (*path, name), at, origin_of)
    except _Unreadable as error:
        yield Problem(dotted, origin, str(error))


def _instead_of_section(node: Node, key: Key, path: Path, origin: str) -> Iterator[Found]:
    """A section may also be an interpolation, null where the schema allows it, or a name with
    nothing under it (all of it commented out)."""
    value = _construct(node, str)
    if value is None and key.nullable:
        yield Setting(path, None, origin)
    elif value is None and node.value == "":
        yield Setting(path, {}, origin)
    elif isinstance(value, str) and "${" in value:
        yield Setting(path, value, origin)
    else:
        yield _no_section(key, path, value, origin)


def _no_section(key: Key, path: Path, got: Any, origin: str) -> Problem:
    names = ", ".join(key.children or {})
    text = f"expected a section with the keys {names}; got {shown(got)}"
    return Problem(".".join(path), origin, text)


def _pairs(node: MappingNode) -> list[tuple[str, Node, Node]]:
    """(name, name's node, value's node) of a map, its `<<` merges resolved (own names win)."""
    own: list[tuple[str, Node, Node]] = []
    merged: dict[str, tuple[str, Node, Node]] = {}
    for name, value in node.value:
        if _is(name, "merge"):
            for source in value.value if isinstance(value, SequenceNode) else [value]:
                if not isinstance(source, MappingNode):
                    raise _Unreadable(f"line {name.start_mark.line + 1}: << takes a map")
                for pair in _pairs(source):
                    merged.setdefault(pair[0], pair)
        elif isinstance(name, ScalarNode):
            own.append((name.value, name, value))
        else:
            raise _Unreadable(f"line {name.start_mark.line + 1}: a key must be a single word")
    names = {pair[0] for pair in own}
    return own + [pair for name, pair in merged.items() if name not in names]


def _construct(node: Node, annotation: Any) -> Any:
    """`node` as plain Python. Raises `_Unreadable`."""
    line = f"line {node.start_mark.line + 1}: "
    if isinstance(node, SequenceNode):
        return [_construct(item, inside(annotation)) for item in node.value]
    if isinstance(node, MappingNode):
        values: dict[str, Any] = {}
        for name, _, value in _pairs(node):
            if name in values:
                raise _Unreadable(f"{line}the key {name!r} is set twice")
            values[name] = _construct(value, inside(annotation, name))
        return values
    text: str = node.value
    kind = node.tag.removeprefix(_TAG)
    match kind:
        case "null":
            return None
        case "str":
            return text
        case "int" | "float" | "bool" if wants_text(annotation):
            return text
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text.replace("_", ""), 0)
        case "float":
            return float(
                text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan")
            )
    raise _Unreadable(f"{line}the YAML tag {node.tag!r} is not for configurations")


def _is(node: Node | None, kind: str) -> bool:
    return isinstance(node, ScalarNode) and node.tag == _TAG + kind


def _is_quoted(node: Node | None) -> bool:
    return isinstance(node, ScalarNode) and node.style in ("'", '"')


def _line(error: yaml.MarkedYAMLError) -> int:
    mark = error.problem_mark or error.context_mark
    return mark.line + 1 if mark else 1


def _reason(error: yaml.MarkedYAMLError) -> str:
    return " ".join(part for part in (error.context, error.problem) if part)


def shown(value: Any) -> str:
    """A value for an error message: as one would write it, and short."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a map of " + ", ".join(map(str, list(value)[:4])) if value else "an empty map"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
