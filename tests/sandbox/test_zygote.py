"""Starting a zygote: what it imports, from where, and how a failure reads."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import dill
import pytest

from sandbox import ChildReport, Ending, Limits, ZygoteFailed

AGENTS = Path(__file__).parent / "agents"
ROOT = Path(__file__).parents[2]


def run_once(lab: Any, target: str, data: Any, **options: Any) -> ChildReport:
    async def go() -> ChildReport:
        zygote = await lab.start(target, **options)
        try:
            return await zygote.run(data)
        finally:
            await zygote.close()

    return lab.run(go())


def test_an_import_error_brings_the_agents_traceback(lab: Any) -> None:
    with pytest.raises(ZygoteFailed) as caught:
        lab.run(lab.start("broken_import:agent"))
    assert "RuntimeError: weights are \\x1b[31mmissing" in str(caught.value)
    assert "broken_import.py" in caught.value.traceback
    assert "in _load_weights" in caught.value.traceback
    assert "_sandbox" not in caught.value.traceback


def test_what_an_import_finds_is_not_its_childrens(lab: Any) -> None:
    async def go() -> ChildReport:
        env = {"A": "import", "HOME": "/nowhere", "OMP_NUM_THREADS": "4"}
        zygote = await lab.start("reads_at_import:agent", env=env)
        try:
            names = ["A", "OMP_NUM_THREADS", "HOME"]
            return await zygote.run({"names": names}, env={"A": "run"})
        finally:
            await zygote.close()

    a, threads, (home, _) = lab.run(go()).value
    assert a == ["import", "run"]
    assert threads == ["1", None], "or what it imports might start threads"
    assert home != "/nowhere"


def test_a_fresh_interpreter_is_tried_with_what_its_import_finds(lab: Any) -> None:
    async def go() -> ChildReport:
        needs = {"A": "1"}
        zygote = await lab.start("needs_a_variable:agent", start="exec", env=needs)
        try:
            return await zygote.run({}, env=needs)
        finally:
            await zygote.close()

    assert lab.run(go()).ending is Ending.RETURNED


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("acts:retruns", "'acts' has no 'retruns'; did you mean 'returns'?"),
        ("acts.retruns", "did you mean 'returns'?"),
        ("atcs:returns", "there is no module 'atcs'"),
        ("atcs:returns", "did you mean 'acts'?"),
        ("acts.deeper.returns", "has no 'deeper'"),
        ("acts.deeper:returns", "there is no module 'deeper' in 'acts'"),
        ("asyncio.tasks", "is a module"),
        ("returns", "is not an import path"),
        ("../acts:returns", "is not an import path"),
        ("acts:", "is not an import path"),
    ],
)
def test_a_wrong_path_is_answered_with_the_nearest_right_name(
    lab: Any, target: str, complaint: str
) -> None:
    with pytest.raises(ZygoteFailed) as caught:
        lab.run(lab.start(target))
    assert complaint in str(caught.value)
    assert caught.value.traceback == ""


def test_an_interpreter_that_is_not_there(lab: Any) -> None:
    with pytest.raises(ZygoteFailed, match="cannot start '/nowhere/python'"):
        lab.run(lab.start("acts:act", python="/nowhere/python"))


def test_an_import_that_exits_or_floods(lab: Any, code: Path) -> None:
    (code / "exits.py").write_text("import os\nprint('bye', flush=True)\nos._exit(9)\n")
    with pytest.raises(ZygoteFailed, match="ended with code 9") as caught:
        lab.run(lab.start("exits:agent", python_path=[str(code)]))
    assert caught.value.traceback == "bye\n"
    (code / "floods.py").write_text("while True: print('x' * 1000)\n")
    with pytest.raises(ZygoteFailed, match="ended with code 137"):
        limits = Limits(output_bytes=2**18)
        lab.run(lab.start("floods:agent", python_path=[str(code)], limits=limits))


def test_an_agent_may_be_sent_by_value(lab: Any) -> None:
    offset = 3.0
    pickled = dill.dumps(lambda data: data["value"] + offset, recurse=True)
    report = run_once(lab, "", {"value": 1.5}, pickled=pickled, python=sys.executable)
    assert (report.ending, report.value) == (Ending.RETURNED, 4.5)


def test_a_threaded_import_is_noted(lab: Any, code: Path) -> None:
    (code / "threaded.py").write_text(
        "import threading\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "def agent(data): return threading.active_count()\n"
    )

    async def go() -> tuple[list[str], ChildReport]:
        zygote = await lab.start("threaded:agent", python_path=[str(code)])
        try:
            return zygote.notes, await zygote.run({})
        finally:
            await zygote.close()

    notes, report = lab.run(go())
    assert "started threads" in notes[0]
    assert report.value == 1


def test_threads_that_are_started_after_each_fork_are_started_in_the_sandbox(
    lab: Any, code: Path
) -> None:
    """As by lancedb and OpenTelemetry, which CrewAI imports. No process with threads can go into
    namespaces, and none of its threads but one would be sealed."""
    (code / "restarts.py").write_text(
        "import os, threading\n"
        "seals = []\n"
        "def start():\n"
        "    thread = threading.Thread(target=lambda: seals.append(seal()), daemon=True)\n"
        "    thread.start()\n"
        "    thread.join()\n"
        "def seal():\n"
        "    with open('/proc/thread-self/status') as file:\n"
        "        lines = file.read().splitlines()\n"
        "    return [line for line in lines if line.startswith(('Seccomp', 'NoNewPrivs'))]\n"
        "os.register_at_fork(after_in_child=start)\n"
        "def agent(data): return seals[-1] == seal()\n"
    )
    report = run_once(lab, "restarts:agent", {}, python_path=[str(code)])
    assert (report.ending, report.value) == (Ending.RETURNED, True), report.error


def test_an_agents_own_sandbox_module_is_its_own(lab: Any, code: Path) -> None:
    (code / "sandbox.py").write_text("def agent(data): return 'the agent\\'s'\n")
    report = run_once(lab, "sandbox:agent", {}, python_path=[str(code)])
    assert report.value == "the agent's"


def test_data_of_every_shape_arrives(lab: Any) -> None:
    data = {"value": {"nul": "\0", "deep": [[[]]], "text": "ä\U0001f600" * 1000, "n": 10**18}}
    assert run_once(lab, "acts:returns", data).value == data["value"]
    large = {"value": 1.0, "image": "x" * (16 * 2**20)}
    assert run_once(lab, "acts:returns", large).value == 1.0


def test_sync_agents_find_the_event_loop_state_of_a_fresh_interpreter(lab: Any, code: Path) -> None:
    (code / "loops.py").write_text(
        "import asyncio\n"
        "def agent(data):\n"
        "    return asyncio.new_event_loop().run_until_complete(asyncio.sleep(0, 5))\n"
    )
    assert run_once(lab, "loops:agent", {}, python_path=[str(code)]).value == 5


def test_a_copy_runs_in_a_bare_isolated_interpreter(bare_python: str, tmp_path: Path) -> None:
    """The package is carried into foreign interpreters: it needs nothing but itself."""
    shutil.copytree(ROOT / "sandbox", tmp_path / "carried")
    program = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import asyncio
from pathlib import Path
from carried import SandboxSpec, Zygote
from carried.probe import probe

async def main():
    zygote = await Zygote.start(
        SandboxSpec(), probe(), folder=Path({str(tmp_path)!r}) / "zygote", target="acts:returns",
        python_path=[{str(AGENTS)!r}], timeout_s=30)
    report = await zygote.run({{"value": 0.5}})
    await zygote.close()
    print(report.ending.value, report.value)

asyncio.run(main())
assert not [name for name in sys.modules if name.partition(".")[0] in ("sandbox", "areal_sub")]
"""
    done = subprocess.run(
        [bare_python, "-I", "-S", "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("returned 0.5\n", "")
    assert not (tmp_path / "zygote").exists()


def test_many_zygotes_start_at_once(lab: Any) -> None:
    async def go() -> list[ChildReport]:
        zygotes = await asyncio.gather(*(lab.start("acts:returns") for _ in range(4)))
        runs = (zygote.run({"value": number}) for number, zygote in enumerate(zygotes))
        reports = await asyncio.gather(*runs)
        await asyncio.gather(*(zygote.close() for zygote in zygotes))
        return list(reports)

    assert [report.value for report in lab.run(go())] == [0, 1, 2, 3]
