"""From what a user calls an agent to what runs: import paths, notebook objects, constructors.

The trainer never imports an agent that runs in children: for those, `describe_target` makes what
the child side resolves, by the same rules (that side stands alone, so it has code of its own).
`resolve_target` and `bind_target` are for what runs in this process.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from areal_sub.errors import WorkflowError


def resolve_target(path: str) -> Any:
    """The object at `path` (`pkg.mod:Name` or `pkg.mod.Name`), importing its module.

    Raises `WorkflowError` with the nearest right name, or with what the import raised as its cause.
    """
    module_path, colon, attributes = path.partition(":")
    names = module_path.split(".")
    wanted = attributes.split(".") if colon else []
    if not all(name.isidentifier() for name in names + wanted) or len(names + wanted) < 2:
        raise WorkflowError(f"{path!r} is not an import path: write 'package.module:Name'")
    # With a colon it is clear what the module is; else it is the longest part that is one.
    longest = len(names) if colon else len(names) - 1
    for length in range(longest, longest - 1 if colon else 0, -1):
        module = _import(".".join(names[:length]), path)
        if module is not None:
            return _follow(module, names[length:] + wanted, path)
    raise WorkflowError(f"cannot import {path!r}: {_missing_module(names[:longest], path)}")


def bind_target(target: Any, workflow_kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """What to call with a task: a function itself, a constructed class's `run`, an object's `run`.

    Raises `WorkflowError` where `target` is none of these; constructors raise what they raise.
    """
    name = getattr(target, "__qualname__", None) or repr(target)
    run: Callable[..., Any]
    if isinstance(target, type):
        if not callable(getattr(target, "run", None)):
            raise WorkflowError(f"the class {name} has no method `run(self, data)`")
        instance: Any = target(**workflow_kwargs)
        run = instance.run
        return run
    if workflow_kwargs:
        raise WorkflowError(f"workflow_kwargs are given, but the agent {name} is not a class")
    run = getattr(target, "run", target)
    if not callable(run):
        raise WorkflowError(f"the agent {name} is neither a function nor an object with `run`")
    return run


def describe_target(agent: Any) -> tuple[str, bytes]:
    """(import path, b"") or ("", dill) of an agent, for a child to resolve.

    By value go objects that no import finds again: those of `__main__` or a notebook, closures,
    instances. Their referenced globals go with them, so an agent must not refer to secrets. Raises
    `WorkflowError` where `agent` cannot be pickled.
    """
    if isinstance(agent, str):
        return agent, b""
    path = _import_path(agent)
    if path:
        return path, b""
    import dill

    try:
        pickled: bytes = dill.dumps(agent, recurse=True)
    except Exception as error:
        raise WorkflowError(
            f"the agent {agent!r} cannot be sent to a child ({type(error).__name__}: {error}): "
            f"put it into a module and give its import path, or refer to fewer globals in it"
        ) from error
    return "", pickled


def _import_path(agent: Any) -> str:
    """`module:qualname` where importing that gives `agent` itself, else ""."""
    module = getattr(agent, "__module__", None)
    name = getattr(agent, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or module == "__main__":
        return ""
    found: Any = sys.modules.get(module)
    # A module without a spec (a notebook's, one made by hand) is not there for others to import.
    if getattr(found, "__spec__", None) is None:
        return ""
    for part in name.split("."):
        found = getattr(found, part, None)
    return f"{module}:{name}" if found is agent else ""


def _import(name: str, path: str) -> Any:
    """The module, or None where there is none of that name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if name == missing or name.startswith(missing + "."):
            return None
        raise WorkflowError(f"cannot import {path!r}: {error}") from error
    except (Exception, SystemExit) as error:  # a script may call sys.exit() when it is imported
        raise WorkflowError(f"cannot import {path!r}: {type(error).__name__}: {error}") from error


def _follow(module: Any, names: list[str], path: str) -> Any:
    found = module
    for name in names:
        if not hasattr(found, name):
            inner = [info.name for info in pkgutil.iter_modules(getattr(found, "__path__", []))]
            if name in inner:
                raise WorkflowError(f"{path!r} is a module: name a function or class in it")
            where = getattr(found, "__name__", type(found).__name__)
            near = _hint(name, [*dir(found), *inner])
            raise WorkflowError(f"{path!r}: {where!r} has no {name!r}{near}")
        found = getattr(found, name)
    if inspect.ismodule(found):
        raise WorkflowError(f"{path!r} is a module: name a function or class in it")
    return found


def _missing_module(names: list[str], path: str) -> str:
    """Which part of the dotted name is missing, and what is nearest to it there."""
    folders: list[str] = list(sys.path)
    where = "the import path"
    for length, name in enumerate(names, start=1):
        module = _import(".".join(names[:length]), path)
        if module is None:
            near = _hint(name, (info.name for info in pkgutil.iter_modules(folders)))
            return f"there is no module {name!r} in {where}{near}"
        folders = list(getattr(module, "__path__", []))
        where = repr(".".join(names[:length]))
    return f"{'.'.join(names)!r} is a module, not a function or class"


def _hint(name: str, candidates: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(candidates), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
