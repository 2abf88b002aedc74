"""Agents' own interpreters: other versions, virtual environments, a fresh one for each child."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from sandbox import (
    BlockingSandbox,
    ChildReport,
    Ending,
    SandboxSpec,
    SpecError,
    ZygoteFailed,
    kernel,
)

TIERS = ("namespaces", "process")
ENV = {"PATH": "/usr/bin:/bin"}


def other_pythons() -> list[str]:
    """One interpreter of each version from 3.9 on that is not ours: from pyenv and the system."""
    folders = [*Path("~/.pyenv/versions").expanduser().glob("3.*/bin"), Path("/usr/bin")]
    found: dict[tuple[int, ...], str] = {}
    for folder in folders:
        for path in folder.glob("python3.[0-9]*"):
            parts = path.name.removeprefix("python").split(".")
            if len(parts) == 2 and all(part.isdigit() for part in parts):
                found.setdefault((3, int(parts[1])), str(path))
    return [
        path
        for version, path in sorted(found.items())
        if version >= (3, 9) and version != sys.version_info[:2]
    ]


@pytest.fixture(params=TIERS)
def spec(request: pytest.FixtureRequest) -> SandboxSpec:
    return SandboxSpec(tier=request.param, env=ENV)


@pytest.mark.parametrize(("tier", "start"), [("namespaces", "fork"), ("process", "exec")])
@pytest.mark.parametrize("python", other_pythons() or [""])
def test_any_interpreter_from_3_9_on(code: Path, python: str, tier: str, start: str) -> None:
    spec = SandboxSpec(tier=tier, env=ENV)
    if not python:
        pytest.skip("there is no other Python on this machine")
    (code / "telling.py").write_text(
        "import sys\n"
        "async def agent(data):\n"
        "    return {'version': list(sys.version_info[:2]), 'data': data, 'x': 0.5}\n"
        "def fails(data):\n"
        "    raise ValueError('no')\n"
    )
    options: dict[str, Any] = {"python": python, "python_path": [str(code)], "start": start}
    with BlockingSandbox(spec, target="telling:agent", **options) as box:
        assert box.zygote.notes == []
        report = box.run({"deep": [1, None, "a"]})
    assert report.error == ""
    version = Path(python).name.removeprefix("python")
    assert ".".join(map(str, report.value.pop("version"))) == version
    assert report.value == {"data": {"deep": [1, None, "a"]}, "x": 0.5}
    with BlockingSandbox(spec, target="telling:fails", **options) as box:
        report = box.run({})
    assert (report.ending, report.error) == (Ending.RAISED, "ValueError: no")
    assert "in fails" in report.traceback


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with a package, one that is installed in place, and a `.pth` file with
    code in it."""
    folder = tmp_path_factory.mktemp("environment")
    made = folder / "venv"
    venv.create(made, symlinks=True, with_pip=False)
    (packages,) = made.glob("lib/python*/site-packages")
    (packages / "only_here.py").write_text("NAME = 'only here'\n")
    in_place = folder / "in-place"
    in_place.mkdir()
    (in_place / "installed_in_place.py").write_text("NAME = 'in place'\n")
    (packages / "in_place.pth").write_text(f"{in_place}\n")
    (packages / "startup.pth").write_text("import started_by_site\n")
    (packages / "started_by_site.py").write_text(
        "import pathlib\ntry:\n"
        "    SEEN = pathlib.Path(__file__).parents[4].joinpath('outside').read_text()\n"
        "except OSError as error:\n"
        "    SEEN = type(error).__name__\n"
    )
    (folder / "outside").write_text("of the user's")
    for path in (made, in_place):
        subprocess.run(["chmod", "-R", "o+rX", str(path)], check=True)
    return made


AGENT = """
import sys
import installed_in_place, only_here, started_by_site

def agent(data):
    try:
        import openai
    except ModuleNotFoundError:
        openai = None
    names = [only_here.NAME, installed_in_place.NAME]
    return [*names, started_by_site.SEEN, sys.prefix, openai is None]
"""


@pytest.mark.parametrize("start", ["fork", "exec"])
def test_a_virtual_environment_is_entered_enclosed(
    spec: SandboxSpec, code: Path, environment: Path, start: str
) -> None:
    (code / "of_venv.py").write_text(AGENT)
    with BlockingSandbox(
        spec,
        target="of_venv:agent",
        python=str(environment / "bin/python"),
        python_path=[str(code)],
        start=start,
    ) as box:
        report = box.run()
    assert report.error == ""
    *found, seen, prefix, alone = report.value
    assert found == ["only here", "in place"]
    assert seen in ("FileNotFoundError", "PermissionError"), "its start-up code ran in the sandbox"
    assert prefix == str(environment)
    assert alone, "nothing of this interpreter's own environment is there"


@pytest.mark.skipif(os.getuid() != 0, reason="only root's children are another user")
@pytest.mark.parametrize("start", ["fork", "exec"])
@pytest.mark.parametrize("closed", ["", "lib"])
def test_an_environment_that_is_closed_to_agents_is_named(
    code: Path, tmp_path: Path, start: str, closed: str
) -> None:
    made = tmp_path / "venv"
    venv.create(made, symlinks=True, with_pip=False)
    (made / closed).chmod(0o700)
    (code / "any.py").write_text("def agent(data):\n    return 1\n")
    box = BlockingSandbox(
        SandboxSpec(tier="namespaces", env=ENV),
        target="any:agent",
        python=str(made / "bin/python"),
        python_path=[str(code)],
        start=start,
    )
    with pytest.raises(ZygoteFailed, match=f"cannot read {made / closed}.*chmod -R o\\+rX"), box:
        pass


@pytest.fixture
def fresh(spec: SandboxSpec, code: Path, bare_python: str) -> Any:
    def make(target: str) -> BlockingSandbox:
        return BlockingSandbox(
            spec, target=target, python=bare_python, python_path=[str(code)], start="exec"
        )

    return make


def test_a_fresh_interpreter_shares_nothing_with_the_last(fresh: Any, code: Path) -> None:
    (code / "counting.py").write_text(
        "import os\nPID = os.getpid()\n"
        "def agent(data):\n    print('hello')\n    return PID == os.getpid()\n"
    )
    with fresh("counting:agent") as box:
        reports = [box.run() for _ in range(2)]
    assert [(report.value, report.stdout_tail) for report in reports] == [(True, "hello\n")] * 2


def test_an_agent_without_an_import_path_in_a_fresh_interpreter(lab: Any) -> None:
    dill = pytest.importorskip("dill")

    async def go() -> ChildReport:
        pickled = dill.dumps(lambda data: data["x"] + 1, recurse=True)
        options: dict[str, Any] = {"python": sys.executable, "start": "exec", "reserve": 1}
        zygote = await lab.start("", pickled=pickled, **options)
        try:
            report: ChildReport = await zygote.run({"x": 1})
            return report
        finally:
            await zygote.close()

    report = lab.run(go())
    assert (report.value, report.error) == (2, "")


def test_what_cannot_be_imported_is_told_before_the_first_run(fresh: Any, code: Path) -> None:
    (code / "breaks.py").write_text("def load():\n    raise RuntimeError('no weights')\nload()\n")
    (code / "leaves.py").write_text("import os\nprint('bye', flush=True)\nos._exit(3)\n")
    with pytest.raises(ZygoteFailed, match="RuntimeError: no weights") as caught, fresh("breaks:a"):
        pass
    assert "in load" in caught.value.traceback
    assert "_sandbox" not in caught.value.traceback
    with pytest.raises(ZygoteFailed, match="did you mean 'breaks'"), fresh("braeks:a"):
        pass
    with pytest.raises(ZygoteFailed, match="exited with code 3"), fresh("leaves:a"):
        pass


def test_a_start_that_there_is_not(spec: SandboxSpec) -> None:
    with pytest.raises(SpecError, match="there are: fork, exec"):
        BlockingSandbox(spec, target="a:b", start="spawn").__enter__()


def test_programs_get_input_and_files(spec: SandboxSpec, bare_python: str) -> None:
    big = "x" * 200_000 + "\n"
    script = 'cat; cat settings/a.toml ~/.config/b; pwd >&2; ls -A "$TMPDIR"'
    with BlockingSandbox(spec, python=bare_python) as box:
        report = box.execute(
            ["/bin/sh", "-c", script],
            stdin=big,
            files={"settings/a.toml": "[a]\n", "~/.config/b": "é\n"},
        )
        assert report.stdout_tail.endswith("xxx\n[a]\né\n"), "and nothing was left in TMPDIR"
        assert len(report.stdout_tail) == 8192 - 1
        empty = box.execute(["/bin/cat"])
        assert (empty.exit_code, empty.stdout_tail) == (0, "")
        for path in ("/etc/passwd", "../a", "a/../../b", "~/../x", ""):
            with pytest.raises(SpecError, match="files"):
                box.execute(["/bin/true"], files={path: ""})


def test_what_no_program_can_be_given_is_named(spec: SandboxSpec, bare_python: str) -> None:
    """None of it is the program's end: it was never run."""
    half = "\ud800"  # of a character
    with BlockingSandbox(spec, python=bare_python) as box:
        refused: list[dict[str, Any]] = [
            {"argv": [""]},
            {"argv": ["echo", half]},
            {"env": {"A": half}},
            {"stdin": half},
            {"files": {"a": half}},
            {"files": {half: ""}},
            {"workspace": "a\0b"},
            {"wall_s": float("nan")},
        ]
        for wrong in refused:
            with pytest.raises(SpecError, match=next(iter(wrong)).replace("env", "environment")):
                box.execute(**{"argv": ["/bin/true"], **wrong})
        report = box.execute(["/bin/true"], files={"a": "", "a/b": ""})
        assert report.ending is Ending.SETUP_FAILED
        assert report.error == "sandbox step 'files' failed: EEXIST: File exists at 'a'"
        plain = box.execute(["/bin/ls"], files={"~root/a": ""})
        assert plain.stdout_tail == "~root\n", "no other user's home"


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node on this machine")
def test_a_node_program(spec: SandboxSpec, bare_python: str) -> None:
    program = "process.stdin.on('data', d => console.log(JSON.stringify([`${d}`, process.env.A])))"
    with BlockingSandbox(spec, python=bare_python) as box:
        node = os.path.realpath(str(shutil.which("node")))
        report = box.execute([node, "-e", program], stdin="hello", env={"A": "b"})
    assert (report.exit_code, report.stdout_tail) == (0, '["hello","b"]\n')


def test_no_signal_is_ignored_by_programs(spec: SandboxSpec, bare_python: str) -> None:
    """Python ignores SIGPIPE, and programs would inherit that: `yes | head` goes on for ever.

    So would they what the caller ignores or blocks: here as under `nohup`, and signal 32, which
    only the kernel can be asked for.
    """
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    kernel.set_signal(32, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        with BlockingSandbox(spec, python=bare_python) as box:
            report = box.execute(["/bin/sh", "-c", "grep -E 'Sig(Ign|Blk)' /proc/self/status"])
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        signal.signal(signal.SIGHUP, before)
        kernel.set_signal(32, signal.SIG_DFL)
    assert report.stdout_tail.split() == ["SigBlk:", "0" * 16, "SigIgn:", "0" * 16]
