"""YAML + `${...}` interpolation + dotted overrides → one validated `Config`, or all that is wrong.

The way: `source.py` reads file and overrides into settings with their origins; here they are laid
over one another (base < file < overrides, the later wins), `interpolate.py` resolves `${...}`
against the result *and the schema's defaults*, and pydantic judges the values. Problems of all
these steps are collected and raised as one `ConfigError`, each with its origin and dotted path.

Called by `areal_sub.cli`, by users' scripts (`load_config(sys.argv[1:])`) and by the trainer, which
writes `dump_config` with each run. Nothing heavy is imported: a typing error must cost no second.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from areal_sub.config import interpolate, keys, source
from areal_sub.config.keys import key_at
from areal_sub.config.schema import Config
from areal_sub.config.source import FileProblem, Problem, Setting, shown
from areal_sub.errors import ConfigError

USAGE = "usage: --config FILE [key=value ...]   (keys are dotted: rollout.openai.mode=subproc)"


def load_config(argv: Sequence[str]) -> Config:
    """The configuration that a command line asks for: `--config FILE` and any `key=value`.

    Raises `ConfigError`.
    """
    file: str | None = None
    overrides: list[str] = []
    words = iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        if option == "--config":
            earlier, file = file, value if equals else next(words, None)
            if not file:
                raise ConfigError(f"--config lacks its file\n{USAGE}")
            if earlier is not None:
                raise ConfigError(f"--config is given twice: {earlier} and {file}\n{USAGE}")
        elif option in ("-h", "--help") or (option.startswith("-") and not equals):
            unknown = "" if option in ("-h", "--help") else f"unknown option {option}\n"
            raise ConfigError(f"{unknown}{USAGE}")
        else:
            overrides.append(word)
    if file is None:
        raise ConfigError(f"--config FILE is missing\n{USAGE}")
    return parse_config(Path(file), overrides)


def parse_config(
    file: Path | None, overrides: Sequence[str], *, base: Mapping[str, Any] | None = None
) -> Config:
    """`base`, under the YAML of `file`, under `overrides` (each `a.b.c=value`), as a `Config`.

    Sections are merged key by key; a list or a map of free keys (`workflow_kwargs`) is replaced as
    a whole, unless an override names a key inside it. Raises `ConfigError` with every problem.
    """
    found: list[source.Found] = []
    if base is not None:
        found += source.read_map(base, "the given values")
    if file is not None:
        found += source.read_yaml(_read(file), str(file))
    for override in overrides:
        found += source.read_override(override)

    merged = _Merged(file)
    for one in found:
        if isinstance(one, Setting):
            merged.lay(one)
        else:
            merged.problems.append(one)
    merged.interpolate()
    return merged.validate()


def dump_config(config: Config) -> str:
    """`config` as YAML with nothing left to resolve; `parse_config` makes an equal one of it.

    Raises `ConfigError` where a value is not plain data (only Python code can put one there).
    """
    try:
        return source.write_yaml(_escaped(config.model_dump()))
    except yaml.YAMLError as error:
        raise ConfigError(f"the configuration holds a value that YAML cannot: {error}") from None


class _Merged:
    """The settings of all sources as one tree, the origin of each, and the problems so far."""

    def __init__(self, file: Path | None) -> None:
        self.problems: list[Problem] = []
        self._tree: dict[str, Any] = {}
        self._origins: dict[source.Path, str] = {(): str(file) if file else "the configuration"}

    def lay(self, setting: Setting) -> None:
        """Put one setting over what is there."""
        *parents, name = setting.path or ("",)
        if not setting.path:
            return
        at = self._tree
        for depth, parent in enumerate(parents):
            inner = at.get(parent)
            if isinstance(inner, str) and "${" in inner:
                path = tuple(parents[: depth + 1])
                where = f"{'.'.join(path)} is {inner} ({self._origin(path)})"
                text = f"{where}, so no part of it can be set"
                self.problems.append(Problem(".".join(setting.path), setting.origin, text))
                return
            if not isinstance(inner, dict):
                inner = at[parent] = {}
            at = inner
        opened = setting.value == {} and key_at(setting.path).children is not None
        if not (opened and isinstance(at.get(name), dict)):
            at[name] = _copy(setting.value)
            below = [path for path in self._origins if path[: len(setting.path)] == setting.path]
            for path in below:
                del self._origins[path]
        self._origins[setting.path] = setting.origin

    def _origin(self, path: source.Path) -> str:
        """Where the value at `path` was set, or the nearest section around it."""
        while path not in self._origins:
            path = path[:-1]
        return self._origins[path]

    def _report(self, path: source.Path, text: str) -> None:
        self.problems.append(Problem(".".join(map(str, path)), self._origin(path), text))

    def interpolate(self) -> None:
        """Resolve every `${...}`; what cannot be resolved is reported and taken out."""
        for path, failure in interpolate.resolve(self._tree):
            self._report(path, failure)

    def validate(self) -> Config:
        """Raises `ConfigError` where there is any problem, earlier ones included."""
        try:
            config = Config.model_validate(self._tree)
        except ValidationError as invalid:
            reported = {problem.path for problem in self.problems}
            is_unread = any(isinstance(problem, FileProblem) for problem in self.problems)
            for error in invalid.errors(include_url=False):
                dotted = ".".join(map(str, error["loc"]))
                if dotted not in reported and not (is_unread and error["type"] == "missing"):
                    self._report(error["loc"], _explained(error))  # type: ignore[arg-type]
        else:
            if not self.problems:
                return config
        if len(self.problems) == 1:
            raise ConfigError(str(self.problems[0]))
        lines = "".join(f"\n  {problem}" for problem in self.problems)
        raise ConfigError(f"{len(self.problems)} problems in the configuration:{lines}")


def _explained(error: ErrorDetails) -> str:
    """pydantic's complaint in our words."""
    path = [str(part) for part in error["loc"]]
    key = key_at(path)
    if error["type"] == "extra_forbidden":
        return keys.unknown(".".join(path))
    if error["type"] == "missing":
        return f"must be set: {key.expected}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    annotation = key.annotation
    for part in path[len(key.path.split(".")) :]:
        annotation = keys.inside(annotation, part)
    expected = key.expected if annotation is key.annotation else keys.in_words(annotation)
    text = f"expected {expected}; got {shown(error['input'])}"
    near = keys.nearest(str(error["input"]), keys.choices(annotation))
    return f"{text}; did you mean {near}?" if near else text


def _copy(value: Any) -> Any:
    """Own containers: later settings write into them."""
    if isinstance(value, Mapping):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _escaped(value: Any) -> Any:
    """Text that holds a literal `${`, so that it is read back as it is and not interpolated."""
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: f"{found[1] * 2}\\${{", value)
    return value


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = _nearest_file(file)
        raise ConfigError(
            f"there is no file {file}" + (f"; did you mean {near}?" if near else "")
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None


def _nearest_file(file: Path) -> Path | None:
    """An existing file whose path reads most like `file`, part by part; None where none does."""
    at = Path(file.anchor or ".")
    for part in file.parts[1:] if file.anchor else file.parts:
        try:
            names = [entry.name for entry in at.iterdir()]
        except OSError:
            return None
        near = part if part in (*names, "..", ".") else keys.nearest(part, names)
        if near is None:
            return None
        at /= near
    return at if at.is_file() else None
