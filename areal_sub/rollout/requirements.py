"""What a requirements file depends on, and a lock file (PEP 751) as requirements. For
`environments`; reads files, changes none."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from areal_sub.errors import WorkflowError

MAX_FILES = 10_000
_INCLUDED = re.compile(r"\s*(?:-r|-c|--requirement|--constraint)[=\s]\s*(\S+)")
_LOCAL = re.compile(
    r"\s*(?:(?:-e|--editable)[=\s]\s*)?(?:[\w.\[\],-]+\s*@\s*)?(?:file://)?([^\s#;]+)"
)


def local_files(path: Path) -> list[str]:
    """What tells one state of the files behind a requirements file from another: those that it
    includes, and local packages that it names. (Files: their content; folders: size and time of
    each file.)"""
    return sorted(_states(path, set()))


def _states(path: Path, seen: set[Path]) -> Iterator[str]:
    if path in seen or not path.is_file():
        return
    seen.add(path)
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix != ".toml":
        yield f"{path.name}\n{text}"
    for line in text.splitlines():
        if (included := _INCLUDED.match(line)) is not None:
            yield from _states(path.parent / included[1], seen)
        elif (local := _LOCAL.match(line)) is not None:
            name = local[1].partition("[")[0]
            if "/" in name or name.startswith("."):
                yield from _state(path.parent / name)


def _state(path: Path) -> Iterator[str]:
    if path.is_file():
        stat = path.stat()
        yield f"{path} {stat.st_size} {stat.st_mtime_ns}"
    elif path.is_dir():
        for number, file in enumerate(sorted(path.rglob("*"))):
            parts = file.relative_to(path).parts
            if number < MAX_FILES and file.is_file() and "__pycache__" not in parts:
                yield from _state(file)


def requirements_of_lock(content: bytes, path: Path) -> bytes:
    """The packages of a lock file as lines for pip, with hashes. Raises `WorkflowError`."""
    try:
        lock = tomllib.loads(content.decode("utf-8"))
    except ValueError as error:
        raise WorkflowError(f"rollout.openai.agent_env: {path} is not TOML: {error}") from None
    if str(lock.get("lock-version", "")).partition(".")[0] != "1":
        version = lock.get("lock-version")
        raise WorkflowError(
            f"rollout.openai.agent_env: {path} has lock-version {version!r}; this reads 1.0"
        )
    packages = lock.get("packages")
    if not isinstance(packages, list) or not all(isinstance(each, dict) for each in packages):
        raise WorkflowError(f"rollout.openai.agent_env: {path} has no [[packages]]")
    return "".join(f"{_line(package, path)}\n" for package in packages).encode()


def _line(package: dict[str, Any], path: Path) -> str:
    name = package.get("name")
    archive, version = package.get("archive"), package.get("version")
    if isinstance(archive, dict):
        where = archive.get("url") or (path.parent / str(archive.get("path"))).as_uri()
        line, files = f"{name} @ {where}", [archive]
    elif isinstance(version, str) and ("wheels" in package or "sdist" in package):
        sdist = package.get("sdist")
        files = [*package.get("wheels", []), *([sdist] if sdist else [])]
        line = f"{name}=={version}"
    else:
        raise WorkflowError(
            f"rollout.openai.agent_env: {path}: the package {name!r} is neither a version with "
            "wheels or sdist nor an archive: give a requirements file instead"
        )
    if marker := package.get("marker"):
        line += f" ; {marker}"
    hashes = {
        f"--hash={kind}:{value}"
        for each in files
        for kind, value in each.get("hashes", {}).items()
        if kind in ("sha256", "sha384", "sha512")
    }
    return " ".join([line, *sorted(hashes)])
