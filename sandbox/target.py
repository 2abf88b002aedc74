"""From an import path to something that runs: `pkg.mod:Name`, or `pkg.mod.Name`.

A target is a callable that takes the data, or has (or constructs something that has) a `run` method
that does. Resolving imports the target's module, so it happens where that module may run.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .errors import TargetError


def resolve(path: str) -> Any:
    """The object at `path`. Raises `TargetError`, or whatever importing its module raises."""
    module_path, colon, attributes = path.partition(":")
    names = module_path.split(".")
    wanted = attributes.split(".") if colon else []
    if not all(name.isidentifier() for name in names + wanted) or len(names + wanted) < 2:
        raise TargetError(f"{path!r} is not an import path: write 'package.module:Name'")
    if colon:
        module = _import(module_path)
        if module is None:
            raise TargetError(f"cannot import {path!r}: {_no_module(names)}")
        return _follow(module, wanted, path)
    for length in range(len(names) - 1, 0, -1):
        module = _import(".".join(names[:length]))
        if module is not None:
            return _follow(module, names[length:], path)
    raise TargetError(f"cannot import {path!r}: {_no_module(names[:-1])}")


def bind(target: Any, kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """What to call with the data: a class is constructed with `kwargs`, its `run` is bound.

    Raises `TargetError`, or whatever the constructor raises.
    """
    if inspect.isclass(target):
        if not callable(getattr(target, "run", None)):
            raise TargetError(f"the class {target.__qualname__} has no method `run(self, data)`")
        run: Callable[..., Any] = target(**kwargs).run
        return run
    if kwargs:
        raise TargetError(
            f"constructor arguments were given ({', '.join(kwargs)}), but {_describe(target)} "
            f"is not a class"
        )
    if callable(getattr(target, "run", None)):
        run = target.run
        return run
    if not callable(target):
        raise TargetError(f"{_describe(target)} is neither a function nor an object with `run`")
    function: Callable[..., Any] = target
    return function


def _import(name: str) -> Any:
    """The module, or None where there is none of that name (not: where importing it fails)."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(missing + "."):
            return None
        raise


def _follow(module: Any, names: list[str], path: str) -> Any:
    found = module
    for name in names:
        try:
            found = getattr(found, name)
        except AttributeError:
            where = getattr(found, "__name__", type(found).__name__)
            hint = _nearest(name, (entry for entry in dir(found) if not entry.startswith("__")))
            raise TargetError(f"{path!r}: {where!r} has no {name!r}{hint}") from None
    if inspect.ismodule(found):
        raise TargetError(f"{path!r} is a module: name a function or class in it")
    return found


def _no_module(names: list[str]) -> str:
    """Says which part of the dotted name is missing, and what is nearest to it there."""
    import pkgutil

    for length in range(1, len(names) + 1):
        name = ".".join(names[:length])
        if _import(name) is not None:
            continue
        parent = sys.modules.get(".".join(names[: length - 1]))
        folders = list(getattr(parent, "__path__", [])) if length > 1 else sys.path
        hint = _nearest(names[length - 1], (info.name for info in pkgutil.iter_modules(folders)))
        where = f" in {names[length - 2]!r}" if length > 1 else f"; looked in {sys.path}"
        return f"there is no module {names[length - 1]!r}{where}{hint}"
    return f"{'.'.join(names)!r} is a module, not a function or class"


def _nearest(name: str, candidates: Iterable[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, list(candidates), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _describe(target: Any) -> str:
    return f"{getattr(target, '__qualname__', None) or type(target).__qualname__!r}"
