"""Who may import whom, where torch may appear, and what must load without it.

The layers themselves are import-linter's contracts in pyproject.toml (`make lint`); here is what
needs the source of a file or a process of its own.
"""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "vllm", "ray"}
TORCH_HOMES = {"learner", "engines", "trainer", "linear.py"}


# An agent sent by value is loaded where it runs, with the `dill` of the agent's interpreter.
BORROWED_BY_SANDBOX = {"target.py": {"dill"}}


def sources(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.py"))
    assert found, f"{folder} holds no Python"
    return found


def imports(file: Path) -> Iterator[tuple[int, str, int]]:
    """(line, module, level) of each import in `file`, wherever in it; level 0 is absolute."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, 0
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or "", node.level


def tops(file: Path) -> set[str]:
    """Top-level names of the packages that `file` imports absolutely."""
    return {module.partition(".")[0] for _, module, level in imports(file) if level == 0}


def run(*command: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("file", sources(ROOT / "sandbox"), ids=lambda file: file.name)
def test_the_sandbox_imports_the_standard_library_and_itself_relatively(file: Path) -> None:
    allowed = sys.stdlib_module_names | BORROWED_BY_SANDBOX.get(file.name, set())
    depth = len(file.relative_to(ROOT).parts) - 1
    for line, module, level in imports(file):
        if level == 0:
            top = module.partition(".")[0]
            assert top in allowed, f"{file}:{line} imports {module}"
        assert level <= depth, f"{file}:{line} reaches out of the sandbox"


def test_torch_stays_with_those_who_compute() -> None:
    for file in sources(ROOT / "areal_sub"):
        package = file.relative_to(ROOT / "areal_sub").parts[0]
        if package not in TORCH_HOMES:
            assert not tops(file) & HEAVY, f"{file} imports {tops(file) & HEAVY}"


@pytest.mark.parametrize("library", ["vllm", "ray"])
def test_vllm_and_ray_are_each_behind_one_folder(library: str) -> None:
    users = {file.parent for file in sources(ROOT / "areal_sub") if library in tops(file)}
    assert len(users) <= 1, users


def test_one_module_knows_the_sandbox() -> None:
    users = [file for file in sources(ROOT / "areal_sub") if "sandbox" in tops(file)]
    assert len(users) == 1, users
    assert users[0].parent == ROOT / "areal_sub" / "rollout"


@pytest.mark.parametrize(
    "module",
    [
        "areal_sub",
        "areal_sub.cli",
        "areal_sub.config",
        "areal_sub.inspection",
        "areal_sub.proxy",
        "areal_sub.rollout",
        "areal_sub.schedulers",
        "areal_sub.trajectory",
        "areal_sub.workflow",
        "sandbox",
    ],
)
def test_importing_all_of_it_loads_nothing_heavy(module: str) -> None:
    program = (
        "import importlib, json, pkgutil, sys\n"
        "package = importlib.import_module(sys.argv[1])\n"
        "inner = getattr(package, '__path__', []) if sys.argv[1] != 'areal_sub' else []\n"
        "for found in pkgutil.walk_packages(inner, sys.argv[1] + '.'):\n"
        # a ready agent needs the SDK of its framework, which need not be installed
        "    if '.workflow.' not in found.name and '__main__' not in found.name:\n"
        "        importlib.import_module(found.name)\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))\n"
    )
    loaded = set(json.loads(run(sys.executable, "-c", program, module)))
    assert not loaded & HEAVY


def test_the_sandbox_runs_from_a_copy_in_a_bare_interpreter(tmp_path: Path) -> None:
    shutil.copytree(
        ROOT / "sandbox", tmp_path / "sandbox", ignore=shutil.ignore_patterns("__pycache__")
    )
    program = (
        "import importlib, pkgutil, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import sandbox\n"
        "names = [m.name for m in pkgutil.walk_packages(sandbox.__path__, 'sandbox.')]\n"
        "for name in names:\n"
        "    module = importlib.import_module(name)\n"
        "    assert module.__file__.startswith(sys.argv[1]), module.__file__\n"
        "print(*names)\n"
    )
    names = run(sys.executable, "-I", "-S", "-c", program, str(tmp_path), cwd=tmp_path).split()
    files = {file.relative_to(tmp_path) for file in sources(tmp_path / "sandbox")}
    assert len(names) == len(files) - 1, "all but sandbox/__init__.py itself"
