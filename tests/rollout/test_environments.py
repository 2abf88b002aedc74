"""Agent environments: found as they are, or built once, for real and offline."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from areal_sub.config.schema import SandboxConfig
from areal_sub.errors import WorkflowError
from areal_sub.rollout import environments
from areal_sub.rollout.environments import Environment, cache_folder, prepare
from areal_sub.rollout.requirements import local_files, requirements_of_lock

Prepare = Callable[..., Environment]


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def make(tmp_path: Path, said: list[str]) -> Prepare:
    def go(
        agent_env: Path | str | None, agent_python: str | None = None, timeout_s: float = 60.0
    ) -> Environment:
        given = None if agent_env is None else str(agent_env)
        cache = tmp_path / "cache"
        return prepare(given, agent_python, cache=cache, timeout_s=timeout_s, say=said.append)

    return go


def make_wheel(folder: Path, name: str = "toy", version: str = "1.0") -> Path:
    folder.mkdir(exist_ok=True)
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    contents = {
        f"{name}.py": f"VERSION = {version!r}\ndef main():\n    print(VERSION)\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[console_scripts]\n{name}-program = {name}:main\n",
    }
    record = "".join(f"{path},,\n" for path in [*contents, f"{info}/RECORD"])
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in {**contents, f"{info}/RECORD": record}.items():
            archive.writestr(path, content)
    return wheel


def ask(environment: Environment, code: str) -> str:
    command = [environment.python, "-I", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def requirements(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    make_wheel(folder / "wheels")
    file = folder / "requirements.txt"
    file.write_text("--no-index\n--find-links wheels\ntoy==1.0  # the agent's\n")
    return file


def test_requirements_are_built_once(
    make: Prepare, requirements: Path, said: list[str], tmp_path: Path
) -> None:
    built = make(requirements)
    assert ask(built, "import toy; print(toy.VERSION)") == "1.0"
    assert [line.split()[0] for line in said] == ["building", "built"]
    assert str(requirements) in said[0]
    assert make(requirements) == built
    assert len(said) == 2, "the second time it was there"
    # Its programs start where they lie: nothing was moved after it was installed.
    program = Path(built.programs[0]) / "toy-program"
    assert subprocess.run([program], capture_output=True, text=True).stdout == "1.0\n"
    assert built.env == {"VIRTUAL_ENV": str(Path(built.python).parents[1])}
    assert built.python.startswith(str(tmp_path / "cache"))
    for folder in (Path(built.python).parents[1], Path(built.python).parent):
        assert stat.S_IMODE(folder.stat().st_mode) & 0o555 == 0o555, "agents may be another user"


def test_other_content_or_another_interpreter_is_another_environment(
    make: Prepare, requirements: Path
) -> None:
    first = make(requirements)
    requirements.write_text(requirements.read_text() + "# more\n")
    second = make(requirements)
    included = requirements.parent / "more.txt"
    included.write_text("toy\n")
    requirements.write_text(requirements.read_text() + "-r more.txt\n")
    third = make(requirements)
    included.write_text("toy>=1.0\n")
    fourth = make(requirements)
    other = make(requirements, "/usr/bin/python3")
    pythons = [each.python for each in (first, second, third, fourth, other)]
    assert len(set(pythons)) == len(pythons)
    assert ask(other, "import sys; print(sys.base_prefix)") == "/usr"


def test_what_pip_says_is_told(make: Prepare, tmp_path: Path) -> None:
    file = tmp_path / "requirements.txt"
    file.write_text("--no-index\nno-such-package-at-all\n")
    with pytest.raises(WorkflowError) as caught:
        make(file)
    text = str(caught.value)
    assert f"{file} for Python {sys.version_info.major}.{sys.version_info.minor}" in text
    assert "pip" in text and "ended with code 1" in text
    assert "No matching distribution found for no-such-package-at-all" in text
    log = Path(text.rpartition("all of it: ")[2])
    assert "no-such-package-at-all" in log.read_text()
    assert not [path for path in log.parent.iterdir() if path.is_dir()], (
        "nothing half-built is left"
    )


def test_a_build_has_a_deadline(tmp_path: Path) -> None:
    wanted = environments._Wanted(
        key="slow", label="slow.txt", steps=lambda folder: [["/bin/sleep", "60"]]
    )
    builder = environments._Builder(tmp_path / "e", time.monotonic() + 0.3, 0.3, lambda _: None)
    with pytest.raises(WorkflowError, match=r"did not end within 0\.3 s .*agent_env_timeout_s"):
        builder.build(wanted)
    assert not (tmp_path / "e" / "slow").exists()


def test_one_builds_and_the_others_wait(tmp_path: Path) -> None:
    """As two runs that are started at once; the lock is one between processes."""
    said: list[str] = []
    go_on = tmp_path / "go-on"
    os.mkfifo(go_on)
    wanted = environments._Wanted(
        key="k",
        label="the label",
        steps=lambda folder: [["/bin/sh", "-c", f"echo built >> {tmp_path}/built; cat {go_on}"]],
    )

    def build(number: int) -> None:
        def say(text: str) -> None:
            said.append(f"{number}: {text}")

        environments._Builder(tmp_path / "e", time.monotonic() + 30, 30, say).build(wanted)

    first = threading.Thread(target=build, args=(1,))
    first.start()
    with go_on.open("w"):  # opens when the step reads
        second = threading.Thread(target=build, args=(2,))
        second.start()
        while not any(line.startswith("2: waiting") for line in list(said)):
            second.join(timeout=0.01)
    first.join()
    second.join()
    assert (tmp_path / "built").read_text() == "built\n"
    assert (tmp_path / "e" / "k" / ".complete").is_file()


def test_what_a_crash_left_is_built_anew(make: Prepare, requirements: Path) -> None:
    built = make(requirements)
    folder = Path(built.python).parents[1]
    (folder / ".complete").unlink()
    (folder / "bin" / "python").unlink()
    assert make(requirements) == built
    assert ask(built, "print('here')") == "here"


def test_a_lock_file_installs_exactly_what_it_names(make: Prepare, tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "wheels")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    lock = tmp_path / "pylock.toml"
    lock.write_text(
        'lock-version = "1.0"\ncreated-by = "test"\n[[packages]]\nname = "toy"\n'
        f'archive = {{ path = "wheels/{wheel.name}", hashes = {{ sha256 = "{digest}" }} }}\n'
    )
    assert ask(make(lock), "import toy; print(toy.VERSION)") == "1.0"
    lock.write_text(lock.read_text().replace(digest, "0" * 64))
    with pytest.raises(WorkflowError, match=r"HASHES|hash"):
        make(lock)


def test_a_lock_as_requirements(tmp_path: Path) -> None:
    lock = tmp_path / "pylock.dev.toml"
    text = """
lock-version = "1.0"
[[packages]]
name = "a"
version = "1.5"
marker = "python_version >= '3.9'"
wheels = [{ name = "a.whl", url = "https://h/a.whl", hashes = { sha256 = "11" } }]
sdist = { name = "a.tar.gz", url = "https://h/a.tar.gz", hashes = { sha256 = "00" } }
[[packages]]
name = "b"
archive = { url = "https://h/b.zip", hashes = { sha256 = "22" } }
"""
    assert requirements_of_lock(text.encode(), lock).decode().splitlines() == [
        "a==1.5 ; python_version >= '3.9' --hash=sha256:00 --hash=sha256:11",
        "b @ https://h/b.zip --hash=sha256:22",
    ]
    for broken, complaint in [
        ("lock-version = ", "is not TOML"),
        ('lock-version = "2.0"', "lock-version '2.0'"),
        ('lock-version = "1.0"', "no .*packages"),
        ('lock-version = "1.0"\n[[packages]]\nname = "v"\nvcs = { url = "u" }', "the package 'v'"),
    ]:
        with pytest.raises(WorkflowError, match=complaint):
            requirements_of_lock(broken.encode(), lock)


def test_local_packages_count(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "setup.py").write_text("1")
    file = tmp_path / "requirements.txt"
    for line in ("./package", "-e ./package[extra]", "pkg @ ./package"):
        file.write_text(f"{line}\n-r {file.name}\n")
        before = local_files(file)
        (package / "setup.py").write_text((package / "setup.py").read_text() + "1")
        assert local_files(file) != before, line


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_virtual_environment_is_used_as_it_is(
    make: Prepare, tmp_path: Path, as_folder: bool, said: list[str]
) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-I", "-m", "venv", "--without-pip", venv], check=True)
    found = make(venv if as_folder else venv / "bin" / "python")
    assert found.python == str(venv / "bin" / "python")
    assert found.programs == (str(venv / "bin"),)
    assert found.readable[0] == str(venv)
    assert said == []


def test_an_interpreter_alone(make: Prepare) -> None:
    found = make("/usr/bin/python3")
    assert (found.python, found.env) == ("/usr/bin/python3", {})
    assert make(None, "/usr/bin/python3").python == ask(found, "import sys; print(sys.executable)")
    assert make(None) == Environment()


def test_vocabularies_of_litellm_are_found(make: Prepare, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-I", "-m", "venv", "--without-pip", venv], check=True)
    (packages,) = venv.glob("lib/python*/site-packages")
    tokenizers = packages / "litellm" / "litellm_core_utils" / "tokenizers"
    tokenizers.mkdir(parents=True)
    assert make(venv).env["TIKTOKEN_CACHE_DIR"] == str(tokenizers)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("nowhere", "is not there; give a virtual environment's folder"),
        ("empty", "holds neither bin/python nor package.json"),
        ("notes.md", "is none of these"),
        ("shell", r"cannot be used|no Python interpreter"),
    ],
)
def test_what_is_no_environment(make: Prepare, tmp_path: Path, name: str, complaint: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("pytest")
    (tmp_path / "shell").write_text("#!/bin/sh\necho hello\n")
    (tmp_path / "shell").chmod(0o755)
    with pytest.raises(WorkflowError, match=complaint):
        make(tmp_path / name)


def test_a_python_that_is_not_there(make: Prepare, tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("")
    with pytest.raises(WorkflowError, match=r"agent_python=python3\.99: there is no such"):
        make(tmp_path / "requirements.txt", "python3.99")


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder({"XDG_CACHE_HOME": "/c"}) == Path("/c/areal-sub")
    monkeypatch.setenv("HOME", "/home/u")
    for environ in ({}, {"XDG_CACHE_HOME": "relative"}):
        assert cache_folder(environ) == Path("/home/u/.cache/areal-sub")


@pytest.fixture
def node_package(tmp_path: Path) -> Path:
    if shutil.which("npm") is None:
        pytest.skip("there is no npm on this machine")
    folder = tmp_path / "agent"
    (folder / "dependency").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": "agent", "version": "1.0.0"}))
    return folder


def test_node_packages_are_installed_without_their_scripts(
    make: Prepare, node_package: Path, tmp_path: Path, said: list[str]
) -> None:
    dependency: dict[str, Any] = {
        "name": "toy",
        "version": "1.0.0",
        "bin": {"toy-program": "index.js"},
        "scripts": {"install": f"touch {tmp_path}/ran"},
    }
    source = tmp_path / "source" / "package"
    source.mkdir(parents=True)
    (source / "package.json").write_text(json.dumps(dependency))
    (source / "index.js").write_text("#!/usr/bin/env node\nmodule.exports = 42\n")
    archive = tmp_path / "toy-1.0.0.tgz"
    command = ["tar", "-czf", archive, "-C", source.parent, "package"]
    subprocess.run(command, check=True)
    package = {"name": "agent", "version": "1.0.0", "dependencies": {"toy": f"file:{archive}"}}
    (node_package / "package.json").write_text(json.dumps(package))
    found = make(node_package)
    assert (found.python, len(said)) == ("", 2)
    assert (Path(found.programs[0]) / "toy-program").exists()
    node = subprocess.run(
        ["node", "-e", "console.log(require('toy'))"],
        env={**os.environ, **found.env},
        capture_output=True,
        text=True,
    )
    assert node.stdout == "42\n", node.stderr
    assert not (tmp_path / "ran").exists()
    assert make(node_package) == found and len(said) == 2


def test_node_modules_that_are_there_are_used(make: Prepare, node_package: Path) -> None:
    (node_package / "node_modules").mkdir()
    found = make(node_package)
    assert found.env["NODE_PATH"] == str(node_package / "node_modules")
    assert found.readable == (str(node_package),)


def test_node_fetches_in_a_childs_address_space(make: Prepare, node_package: Path) -> None:
    """Loading the HTTP parser fails on its own, beside the connection that is refused."""
    (node_package / "node_modules").mkdir()
    found = make(node_package)
    if "NODE_OPTIONS" not in found.env:
        pytest.skip("this Node does not know --disable-wasm-trap-handler")
    code = 'fetch("http://127.0.0.1:1000").catch((error) => console.log(error.cause.code))'
    limit = SandboxConfig().max_memory_bytes
    done = subprocess.run(
        ["prlimit", f"--as={limit}", "node", "-e", code],
        env={**os.environ, **found.env},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "ECONNREFUSED\n"), done.stderr
