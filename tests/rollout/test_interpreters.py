"""Finding a Python interpreter by path, name and version, where version managers put theirs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from areal_sub.errors import WorkflowError
from areal_sub.rollout.interpreters import find_python


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """A user who has nothing."""
    return {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "HOME": str(tmp_path)}


def wrapper(path: Path, says: str = "") -> Path:
    """An interpreter that says it is the file `says`; one that refuses, where that is empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = f"echo {says}" if says else "echo 'that version is not chosen' >&2; exit 127"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("given", ["3.99", "python3.99"])
def test_a_version_is_looked_for_on_the_path(
    environ: dict[str, str], tmp_path: Path, given: str
) -> None:
    wrapper(tmp_path / "bin/python3.99", "/the/real/one")
    assert find_python(given, environ) == Path("/the/real/one")


@pytest.mark.parametrize(
    "folder", [".pyenv/versions/3.99.{}", ".local/share/uv/python/cpython-3.99.{}-linux"]
)
def test_then_among_what_version_managers_have_newest_first(
    environ: dict[str, str], tmp_path: Path, folder: str
) -> None:
    wrapper(tmp_path / "bin/python3.99")  # pyenv's own, where that version is not the chosen one
    for patch in (9, 10):
        wrapper(tmp_path / folder.format(patch) / "bin/python3.99", f"/patch/{patch}")
    assert find_python("3.99", environ) == Path("/patch/10")


def test_where_the_managers_are_told_to_be(environ: dict[str, str], tmp_path: Path) -> None:
    wrapper(tmp_path / "elsewhere/versions/3.99.1/bin/python3.99", "/of/pyenv")
    assert find_python("3.99", {**environ, "PYENV_ROOT": str(tmp_path / "elsewhere")}) == Path(
        "/of/pyenv"
    )


def test_a_path_is_taken_as_it_is(environ: dict[str, str], tmp_path: Path) -> None:
    assert find_python(sys.executable, environ) == Path(sys.executable)
    inside = wrapper(tmp_path / "venv/bin/python", "/in/the/venv")
    assert find_python(str(inside.parents[1]), environ) == Path("/in/the/venv")


def test_what_refuses_says_why(environ: dict[str, str], tmp_path: Path) -> None:
    wrapper(tmp_path / "bin/python3.99")
    with pytest.raises(WorkflowError, match=r"agent_python=3\.99 .*that version is not chosen"):
        find_python("3.99", environ)
    with pytest.raises(WorkflowError, match=r"agent_python=3\.98: there is no such"):
        find_python("3.98", environ)
