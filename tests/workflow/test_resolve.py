"""Import paths and objects, on the trainer's side."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import dill
import pytest

from areal_sub.errors import WorkflowError
from areal_sub.workflow import AgentWorkflow, bind_target, describe_target, resolve_target

MODULE = """
class Agent:
    def __init__(self, scale=1.0):
        self.scale = scale
    async def run(self, data, **extra_kwargs):
        return self.scale
    class Nested:
        async def run(self, data):
            return 0.0

async def agent(data):
    return 1.0

agent_instance = Agent(2.0)
not_an_agent = 3
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = tmp_path / "resolve_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "good.py").write_text(MODULE)
    (folder / "bad.py").write_text("import resolve_missing_dependency\n")
    (folder / "worse.py").write_text("raise RuntimeError('at import')\n")
    (folder / "script.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.startswith("resolve_package")]:
        del sys.modules[name]


@pytest.mark.parametrize("separator", [".", ":"])
@pytest.mark.parametrize("name", ["Agent", "agent", "Agent.Nested"])
@pytest.mark.usefixtures("package")
def test_both_forms_lead_to_the_object(separator: str, name: str) -> None:
    found = resolve_target(f"resolve_package.good{separator}{name}")
    assert found.__qualname__ == name


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("resolve_package.good.Agnet", "did you mean 'Agent'?"),
        ("resolve_package.good:Agnet", "did you mean 'Agent'?"),
        ("resolve_package.godo.Agent", "'resolve_package' has no 'godo'; did you mean 'good'?"),
        (
            "resolve_package.godo:Agent",
            "no module 'godo' in 'resolve_package'; did you mean 'good'",
        ),
        ("resolve_pakcage.good.Agent", "did you mean 'resolve_package'?"),
        ("resolve_package.bad.Agent", "No module named 'resolve_missing_dependency'"),
        ("resolve_package.worse:Agent", "RuntimeError: at import"),
        ("resolve_package.script:Agent", "SystemExit: 3"),
        ("resolve_package.good", "is a module"),
        ("resolve_package", "is not an import path"),
        ("/path/to/good.py:Agent", "is not an import path"),
        ("", "is not an import path"),
    ],
)
def test_a_wrong_path_is_explained(path: str, complaint: str) -> None:
    with pytest.raises(WorkflowError) as caught:
        resolve_target(path)
    assert complaint in str(caught.value)


@pytest.mark.usefixtures("package")
def test_binding_constructs_classes_and_takes_the_rest_as_it_is() -> None:
    agent_class = resolve_target("resolve_package.good.Agent")
    assert bind_target(agent_class, {"scale": 3.0}).__self__.scale == 3.0  # type: ignore[attr-defined]
    function = resolve_target("resolve_package.good:agent")
    assert bind_target(function, {}) is function
    assert bind_target(resolve_target("resolve_package.good.agent_instance"), {})
    for target, kwargs in ((function, {"scale": 1}), (3, {}), (dict, {})):
        with pytest.raises(WorkflowError):
            bind_target(target, kwargs)


@pytest.mark.usefixtures("package")
def test_what_can_be_imported_is_described_by_its_path() -> None:
    assert describe_target("any.path:Name") == ("any.path:Name", b"")
    for name in ("Agent", "agent", "Agent.Nested"):
        found = resolve_target(f"resolve_package.good:{name}")
        assert describe_target(found) == (f"resolve_package.good:{name}", b"")


@pytest.mark.usefixtures("package")
def test_what_cannot_be_imported_goes_by_value() -> None:
    scale = 2.5

    async def closure(data: dict[str, Any]) -> float:
        return scale

    instance = resolve_target("resolve_package.good.agent_instance")
    for agent in (closure, lambda data: scale, instance):
        path, pickled = describe_target(agent)
        assert path == ""
        assert dill.loads(pickled) is not None
    made_by_hand = types.ModuleType("made_by_hand")
    exec("def agent(data): return 1.0", made_by_hand.__dict__)
    sys.modules["made_by_hand"] = made_by_hand
    try:
        assert describe_target(made_by_hand.agent)[0] == ""
    finally:
        del sys.modules["made_by_hand"]


def test_what_cannot_be_pickled_is_named() -> None:
    import threading

    lock = threading.Lock()
    generator = (number for number in range(3))
    with pytest.raises(WorkflowError, match="cannot be sent to a child"):
        describe_target(lambda data: (lock, next(generator)))


def test_an_agent_of_a_script_takes_only_the_globals_it_uses(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import asyncio, sys\n"
        "from areal_sub.workflow import AgentWorkflow, describe_target\n"
        "SECRET = 'the secret ' + 'of the script'\n"
        "BONUS = 0.5\n"
        "class Mine(AgentWorkflow):\n"
        "    async def run(self, data, **extra_kwargs):\n"
        "        return data['reward'] + BONUS\n"
        "sys.stdout.buffer.write(describe_target(Mine)[1])\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, script], capture_output=True, cwd=root, env={"PYTHONPATH": str(root)}
    )
    assert done.returncode == 0, done.stderr
    assert b"of the script" not in done.stdout
    loader = (
        "import asyncio, sys, dill\n"
        "agent = dill.loads(sys.stdin.buffer.read())\n"
        "print(asyncio.run(agent().run({'reward': 1.0})))\n"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", loader],
        input=done.stdout,
        capture_output=True,
        cwd=root,
        env={"PYTHONPATH": str(root)},
    )
    assert loaded.stdout == b"1.5\n", loaded.stderr


def test_the_class_form_must_define_run() -> None:
    class Empty(AgentWorkflow):
        pass

    with pytest.raises(TypeError, match="run"):
        Empty()  # type: ignore[abstract]
