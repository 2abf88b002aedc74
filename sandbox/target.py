"""From an import path to something that runs: `pkg.mod:Name`, or `pkg.mod.Name`.

A target is a callable that takes the data, or has (or constructs something that has) a `run` method
that does. Resolving imports the target's module, so it happens where that module may run.
"""

from __future__ import annotations

import base64
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .errors import TargetError


class Program:
    """The target of a sandbox that executes programs: each request names its own."""


def load_target(path: str, pickled: str) -> Any:
    """The object at `path`, or the one in `pickled` (base64 of its dill).

    Raises `TargetError`, or whatever importing or unpickling raises.
    """
    if not pickled:
        return resolve(path)
    try:
        import dill
    except ModuleNotFoundError:
        raise TargetError(
            "the agent was sent by value, which needs the package `dill` in its environment: "
            "install it there, or give the agent's import path"
        ) from None
    return dill.loads(base64.b64decode(pickled))


def import_error(error: BaseException) -> str:
    """What `load_target` raised, in a line."""
    try:
        return str(error) if isinstance(error, TargetError) else f"{type(error).__name__}: {error}"
    except Exception:  # its `__str__` is the agent's code
        return type(error).__name__


def resolve(path: str) -> Any:
    """The object at `path`. Raises `TargetError`, or whatever importing its module raises."""
    module_path, colon, attributes = path.partition(":")
    names = module_path.split(".")
    wanted = attributes.split(".") if colon else []
    if not all(name.isidentifier() for name in names + wanted) or len(names + wanted) < 2:
        raise TargetError(f"{path!r} is not an import path: write 'package.module:Name'")
    # With a colon it is clear what the module is; else it is the longest part that is one.
    longest = len(names) if colon else len(names) - 1
    for length in range(longest, longest - 1 if colon else 0, -1):
        module = _import(".".join(names[:length]))
        if module is not None:
            return _follow(module, names[length:] + wanted, path)
    raise TargetError(f"cannot import {path!r}: {_missing_module(names[:longest])}")


def bind(target: Any, kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """What to call with the data: a class is constructed with `kwargs`, its `run` is bound.

    Raises `TargetError`, or whatever the constructor raises.
    """
    run: Callable[..., Any]
    if inspect.isclass(target):
        if not callable(getattr(target, "run", None)):
            raise TargetError(f"the class {target.__qualname__} has no method `run(self, data)`")
        instance: Any = target(**kwargs)
        run = instance.run
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
            inner = _modules_in(getattr(found, "__path__", []))
            if name in inner:
                raise TargetError(f"{path!r} is a module: name a function or class in it") from None
            where = getattr(found, "__name__", type(found).__name__)
            hint = _nearest(name, [*dir(found), *inner])
            raise TargetError(f"{path!r}: {where!r} has no {name!r}{hint}") from None
    if inspect.ismodule(found):
        raise TargetError(f"{path!r} is a module: name a function or class in it")
    return found


def _missing_module(names: list[str]) -> str:
    """Which part of the dotted name is missing, and what is nearest to it there."""
    folders = sys.path
    where = f"the import path {sys.path}"
    for length, name in enumerate(names, start=1):
        module = _import(".".join(names[:length]))
        if module is None:
            near = _nearest(name, _modules_in(folders))
            return f"there is no module {name!r} in {where}{near}"
        folders = list(getattr(module, "__path__", []))
        where = repr(".".join(names[:length]))
    return f"{'.'.join(names)!r} is a module, not a function or class"


def _modules_in(folders: Iterable[str]) -> list[str]:
    import pkgutil

    return [info.name for info in pkgutil.iter_modules(folders)]


def _nearest(name: str, candidates: Iterable[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, list(candidates), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _describe(target: Any) -> str:
    return f"{getattr(target, '__qualname__', None) or type(target).__qualname__!r}"
