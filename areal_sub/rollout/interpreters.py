"""Python interpreters on this machine: found by name, and asked what they are. For `environments`.

Whatever is executed here is one that the user names, or that a version manager of the user's has
installed; every question has a deadline.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from areal_sub.errors import WorkflowError

ASK_TIMEOUT_S = 30.0
# Without `site`: what the environment runs at start-up is for the sandbox.
_ASK = (
    "import json, sys; print(json.dumps([sys.version, sys.base_prefix, sys.implementation.name]))"
)
_VERSION = re.compile(r"(?:python)?(3\.\d+)")


def python_in(folder: Path) -> Path | None:
    for name in ("python", "python3"):
        if os.access(folder / "bin" / name, os.X_OK):
            return folder / "bin" / name
    return None


def find_python(given: str, environ: Mapping[str, str] = os.environ) -> Path:
    """By path (of an interpreter, or of an environment), by name on the PATH, or by version:
    `python3.12` and `3.12` are looked for among what pyenv and uv have installed, too.

    Raises `WorkflowError`.
    """
    path = Path(given).expanduser()
    if path.is_dir() and (inside := python_in(path)) is not None:
        path = inside
    version = _VERSION.fullmatch(given)
    name = f"python{version[1]}" if version else str(path)
    found = shutil.which(name, path=environ.get("PATH"))
    candidates = [] if found is None else [Path(found)]
    if version is not None:
        candidates += _managed(version[1], environ)
    refusals = []
    for candidate in candidates:
        try:
            # What wrappers lead to. Not resolved: a virtual environment's is a link.
            command = [str(candidate), "-I", "-S", "-c", "import sys; print(sys.executable)"]
            return Path(output_of(command, f"rollout.openai.agent_python={given}").strip())
        except WorkflowError as error:  # a wrapper of a version that is not chosen
            refusals.append(error)
    if refusals:
        raise refusals[0]
    raise WorkflowError(f"rollout.openai.agent_python={given}: there is no such interpreter")


def _managed(version: str, environ: Mapping[str, str]) -> Iterator[Path]:
    """Newest first."""
    home = Path(environ.get("HOME", "/"))
    pyenv = Path(environ.get("PYENV_ROOT", home / ".pyenv")) / "versions"
    data = Path(environ.get("XDG_DATA_HOME", home / ".local/share"))
    uv = Path(environ.get("UV_PYTHON_INSTALL_DIR", data / "uv/python"))
    folders = [*pyenv.glob(f"{version}.*"), *uv.glob(f"cpython-{version}.*")]
    for folder in sorted(folders, key=_patch_number, reverse=True):
        if (python := folder / "bin" / f"python{version}").is_file():
            yield python


def _patch_number(folder: Path) -> int:
    found = re.search(r"3\.\d+\.(\d+)", folder.name)
    return int(found[1]) if found else -1


def ask(python: Path, given: str) -> tuple[str, str, str]:
    """(version, base prefix, implementation). Raises `WorkflowError`."""
    try:
        version, base_prefix, implementation = json.loads(
            output_of([str(python), "-I", "-S", "-c", _ASK], given)
        )
    except ValueError:
        raise WorkflowError(f"{given}: {python} is no Python interpreter") from None
    return version, base_prefix, implementation


def output_of(command: Sequence[str], given: str) -> str:
    """What a small command prints. Raises `WorkflowError`."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=ASK_TIMEOUT_S,
            check=True,
            text=True,
        )
    except subprocess.CalledProcessError as error:
        last = error.stderr.strip().rpartition("\n")[2]
        raise WorkflowError(f"{given} cannot be used: {command[0]}: {last}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise WorkflowError(f"{given} cannot be used: {error}") from None
    return done.stdout
