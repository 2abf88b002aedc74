"""`${...}` in a configuration's tree, resolved with OmegaConf against the schema's defaults.

Owns the resolving of `${a.b.c}` (absolute), `${.x}` (relative) and `${oc.env:NAME,default}`, and
the words for what goes wrong there. A result is read as the schema wants it at its place, as
environment variables are always text. Called by `load.py` only. OmegaConf is imported only where
there is something to resolve.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from areal_sub.config import keys
from areal_sub.config.keys import ROOT, Key, key_at
from areal_sub.config.source import Path, read_scalar


def resolve(tree: dict[str, Any]) -> list[tuple[Path, str]]:
    """Resolve all of `tree` in place; what cannot be is taken out of it and returned, with why.

    `tree` holds only keys of the schema, as `load.py` makes it.
    """
    leaves = dict(_interpolated(tree, ROOT))
    if not leaves:
        return []
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    failures: list[tuple[Path, str]] = []
    for path in leaves:
        del _parent(tree, path)[path[-1]]
    root = OmegaConf.create(_over(_defaults(ROOT), tree))
    for path, value in list(leaves.items()):
        try:
            OmegaConf.update(root, ".".join(path), value, merge=False, force_add=True)
        except OmegaConfBaseException as error:  # its text cannot even be parsed
            failures.append((path, _why(leaves.pop(path), error)))
    # Maps of free keys come last: what they refer to has its type by then.
    for path in sorted(leaves, key=lambda path: keys.takes_map(key_at(path).annotation)):
        value = leaves[path]
        try:
            result = OmegaConf.select(root, ".".join(path))
            if OmegaConf.is_config(result):
                result = OmegaConf.to_container(result, resolve=True)
        except OmegaConfBaseException as error:
            failures.append((path, _why(value, error)))
        else:
            fitted = _parent(tree, path)[path[-1]] = _refit(result, key_at(path))
            if isinstance(fitted, int | float):
                OmegaConf.update(root, ".".join(path), fitted)
    return failures


def _parent(tree: dict[str, Any], path: Path) -> dict[str, Any]:
    for name in path[:-1]:
        tree = tree[name]
    return tree


def _interpolated(tree: Mapping[str, Any], key: Key) -> Iterator[tuple[Path, Any]]:
    """(path, value) of every value of the schema that holds a `${`."""
    for name, value in tree.items():
        child = (key.children or {})[name]
        if child.children is not None and isinstance(value, dict):
            for path, inner in _interpolated(value, child):
                yield (name, *path), inner
        elif _holds_interpolation(value):
            yield (name,), value


def _holds_interpolation(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds_interpolation(inner) for inner in value.values())
    if isinstance(value, list):
        return any(_holds_interpolation(inner) for inner in value)
    return isinstance(value, str) and "${" in value


def _why(value: Any, error: Exception) -> str:
    """What OmegaConf says about `value`, in our words and with what to do about it."""
    what = value if isinstance(value, str) else "an interpolation in it"
    reason = str(error).partition("\n")[0]
    if found := re.search(r"Interpolation key '(.+)' not found", reason):
        reason = f"there is no value at {found[1]}; {_nearest_key(found[1])}"
    elif found := re.search(r"Environment variable '(.+)' not found", reason):
        name = found[1]
        reason = (
            f"the environment variable {name} is not set; "
            f"set it, or give a default: ${{oc.env:{name},default}}"
        )
    elif found := re.search(r"Unsupported interpolation type (\S+)", reason):
        reason = (
            f"there is no resolver {found[1]!r}; "
            "environment variables are written ${oc.env:NAME,default}"
        )
    elif "Recursive interpolation" in reason or "parent node" in reason:
        reason = "it refers to itself"
    return f"{what}: {reason}"


def _nearest_key(path: str) -> str:
    if key_at(path.split(".")).path == path:
        return f"set {path}"
    return keys.unknown(path).rpartition("; ")[2]


def _defaults(key: Key) -> dict[str, Any]:
    """What the schema puts where nothing is set; required keys are absent."""
    values: dict[str, Any] = {}
    for name, child in (key.children or {}).items():
        if child.children is not None and not child.nullable:
            values[name] = _defaults(child)
        elif not child.required:
            values[name] = child.default
    return values


def _over(under: dict[str, Any], tree: Mapping[str, Any], key: Key = ROOT) -> dict[str, Any]:
    """`tree` over the defaults `under`, section by section."""
    values = dict(under)
    for name, value in tree.items():
        child = (key.children or {})[name]
        if child.children is not None and isinstance(value, dict):
            inner = values.get(name)
            value = _over(inner if isinstance(inner, dict) else _defaults(child), value, child)
        values[name] = value
    return values


def _refit(value: Any, key: Key, annotation: Any = None) -> Any:
    """An interpolation's result as the schema wants it: `${oc.env:SEED}` is text, `seed` is not."""
    if key.children is not None and isinstance(value, dict):
        return {
            name: _refit(inner, key.children[name]) if name in key.children else inner
            for name, inner in value.items()
        }
    annotation = key.annotation if annotation is None else annotation
    if isinstance(value, dict):
        return {k: _refit(v, key, keys.inside(annotation)) for k, v in value.items()}
    if isinstance(value, list):
        return [_refit(item, key, keys.inside(annotation)) for item in value]
    if annotation is Any:  # in a free map, text stays text
        return value
    if isinstance(value, str):
        return read_scalar(value, annotation)
    if keys.wants_text(annotation) and value is not None:
        return str(value).lower() if isinstance(value, bool) else str(value)
    return value
