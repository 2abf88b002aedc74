"""The public face: callables and programs, awaited or not, and the command line."""

from __future__ import annotations

import asyncio
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sandbox import BlockingSandbox, Ending, Limits, Sandbox, SandboxSpec, SpecError, ZygoteFailed
from sandbox.doctor import describe
from sandbox.layers import OUTER, PROBE
from sandbox.probe import Probe

ROOT = Path(__file__).parents[2]
TIERS = ("namespaces", "process", "bwrap")
ENV = {"PATH": "/usr/bin:/bin"}


@pytest.fixture(params=TIERS)
def spec(request: pytest.FixtureRequest, probed: Probe) -> SandboxSpec:
    if reason := probed.layers.get(request.param, ""):
        pytest.skip(f"the tier {request.param} is not to be had here: {reason}")
    return SandboxSpec(tier=request.param, env=ENV)


def test_a_callable_by_import_path(spec: SandboxSpec, code: Path, bare_python: str) -> None:
    (code / "doubling.py").write_text("def double(data):\n    return 2 * data['x']\n")
    with BlockingSandbox(
        spec, target="doubling:double", python=bare_python, python_path=[str(code)]
    ) as box:
        assert [box.run({"x": x}).value for x in (1, 2)] == [2, 4]


def test_programs_their_output_and_their_codes(spec: SandboxSpec, bare_python: str) -> None:
    chunks: list[tuple[int, bytes]] = []

    async def go() -> Any:
        async with Sandbox(spec, python=bare_python, reserve=1) as box:
            script = 'echo "$WORD"; echo oops >&2; exit 7'
            argv = ["/bin/sh", "-c", script]
            return await box.execute(
                argv, env={"WORD": "hello"}, on_output=lambda fd, chunk: chunks.append((fd, chunk))
            )

    report = asyncio.run(go())
    assert (report.ending, report.exit_code) == (Ending.EXITED, 7)
    assert sorted(chunks) == [(1, b"hello\n"), (2, b"oops\n")]


def test_what_cannot_be_executed_is_said_as_a_shell_says_it(
    spec: SandboxSpec, bare_python: str
) -> None:
    with BlockingSandbox(spec, python=bare_python) as box:
        missing = box.execute(["no-such-program"])
        folder = box.execute(["/usr"])
        with pytest.raises(SpecError, match="argv"):
            box.execute([])
    assert (missing.exit_code, folder.exit_code) == (127, 126)
    assert "cannot execute 'no-such-program'" in missing.stderr_tail


@pytest.mark.parametrize(
    ("limits", "script", "ending"),
    [
        (
            Limits(total_memory_bytes=150 * 2**20),
            "import os, time\nfor _ in range(4):\n    if os.fork() == 0:\n"
            "        block = bytearray(b'x' * 2**20 * 60)\n        break\ntime.sleep(30)",
            Ending.MEMORY_LIMIT,
        ),
        (
            Limits(total_cpu_s=1),
            "import os\nwhile True:\n    if os.fork() == 0:\n"
            "        sum(range(10**6))\n        os._exit(0)\n    os.wait()",
            Ending.CPU_LIMIT,
        ),
    ],
)
def test_limits_of_all_processes_together(
    limits: Limits, script: str, ending: Ending, bare_python: str
) -> None:
    spec = SandboxSpec(tier="namespaces", env=ENV, limits=limits)
    with BlockingSandbox(spec, python=bare_python) as box:
        report = box.execute([bare_python, "-I", "-c", script], wall_s=60)
        assert report.ending is ending
        assert box.execute(["/bin/true"]).exit_code == 0


def run(*words: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sandbox", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=timeout_s,
        check=False,
    )


def test_the_command_line_runs_commands() -> None:
    done = run("run", "--env", "A=b", "--", "/bin/sh", "-c", 'echo "$A"; echo e >&2; exit 3')
    assert (done.returncode, done.stdout, done.stderr) == (3, "b\n", "e\n")
    late = run("run", "--time", "0.5", "--", "/bin/sleep", "30")
    assert late.returncode == 124
    assert "did not end within 0.5 s" in late.stderr
    assert run("run").returncode == 125
    plan = run("run", "--plan", "--tier", "process")
    assert plan.stdout.startswith("tier process\n")


def test_the_command_line_brings_files_in_and_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "word").write_text("hello\n")
    script = "mkdir out; tr a-z A-Z < word > out/word; ln -s /etc out/link"
    words = ["--workspace", str(tmp_path / "in"), "--output", "out", "--output", "none"]
    to = tmp_path / "results"
    done = run("run", *words, "--collect-to", str(to), "--", "/bin/sh", "-c", script)
    assert (done.returncode, done.stdout) == (0, ""), done
    assert [(path.name, path.read_text()) for path in to.rglob("*") if path.is_file()] == [
        ("word", "HELLO\n")
    ]
    assert done.stderr == (
        "sandbox: output none: not there\n"
        "sandbox: output out/link: refused: it is a symbolic link\n"
    )
    again = run("run", *words, "--collect-to", str(to), "--", "true")
    assert (again.returncode, again.stderr.count("name a new folder")) == (125, 1)
    assert run("run", *words, "--", "true").returncode == 125
    mounted = run("run", "--mount", f"/in={tmp_path / 'in'}", "--", "cat", "/in/word")
    assert (mounted.returncode, mounted.stdout) == (0, "hello\n"), mounted


def test_doctor_says_what_is_missing_and_what_to_do() -> None:
    shown = run("doctor")
    assert shown.returncode == 0
    assert all(layer in shown.stdout for layer in (*PROBE, *OUTER))
    refused = Probe({**dict.fromkeys(PROBE, ""), "namespaces": "refused; try this"}, landlock_abi=3)
    text = describe(refused)
    assert text.count("refused; try this") == 1
    assert "tier namespaces: no: it takes namespaces, see above" in text
    assert "tier bwrap: no: bwrap was not probed" in text
    assert "auto takes: process" in text
    assert "the network is not confined" in text


@pytest.mark.skipif(shutil.which("unshare") is None, reason="there is no unshare on this machine")
def test_doctor_where_there_may_be_no_more_namespaces() -> None:
    script = f"""
        echo 0 > /proc/sys/user/max_user_namespaces &&
        COLUMNS=60 exec {sys.executable} -m sandbox doctor"""
    shown = subprocess.run(
        ["unshare", "--user", "--map-root-user", "/bin/sh", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    if "unshare" in shown.stderr or "max_user_namespaces" in shown.stderr:
        pytest.skip(f"it takes a user namespace: {shown.stderr}")
    said = " ".join(shown.stdout.split())
    assert "there may be no more namespaces" in said, shown
    assert "Raise the sysctl user.max_user_namespaces" in said
    assert "auto takes: process" in said
    words = max(map(len, said.split(" ")))
    assert max(map(len, shown.stdout.splitlines())) <= max(60, 15 + words)


@pytest.mark.skipif(os.getuid() != 0, reason="only root's children are another user outside")
def test_a_folder_that_roots_children_cannot_read_is_named(code: Path, bare_python: str) -> None:
    code.chmod(0o700)
    spec = SandboxSpec(tier="namespaces", env=ENV)
    with (
        pytest.raises(ZygoteFailed, match=f"no module .* cannot read {code}: chmod"),
        BlockingSandbox(spec, target="a:b", python=bare_python, python_path=[str(code)]),
    ):
        pass


def test_a_command_cannot_send_escapes_to_the_terminal() -> None:
    ours, theirs = pty.openpty()
    script = "printf '\\033]0;pwned\\007h\\303'; sleep 0.2; printf '\\251llo\\n'"
    try:
        subprocess.run(
            [sys.executable, "-m", "sandbox", "run", "--", "/bin/sh", "-c", script],
            stdout=theirs,
            cwd=ROOT,
            check=True,
            timeout=60,
        )
        shown = os.read(ours, 4096).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert shown == "\\x1b]0;pwned\\x07h\u00e9llo\r\n"


@pytest.mark.parametrize("ctrl_c", ["obeyed", "ignored"])
@pytest.mark.parametrize("ends", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("tier", ["namespaces", "process"])
def test_nothing_is_left_of_a_command_whose_caller_is_ended(
    tier: str, ends: signal.Signals, ctrl_c: str, tmp_path: Path
) -> None:
    """Ctrl-C is ignored by what a script's shell starts with `&`."""
    if (ends, ctrl_c) == (signal.SIGINT, "ignored"):
        pytest.skip("it does not end")
    tmp_path.chmod(0o755)
    action = {"obeyed": "SIG_DFL", "ignored": "SIG_IGN"}[ctrl_c]
    start = (
        f"import os, signal, sys; signal.signal(signal.SIGINT, signal.{action});"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    words = [sys.executable, "-c", start, "-m", "sandbox", "run", "--tier", tier, "--"]
    script = "echo left > file; echo up; exec sleep 600"
    with subprocess.Popen(
        [*words, "/bin/sh", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as running:
        assert running.stdout is not None and running.stderr is not None
        assert running.stdout.readline() == b"up\n"
        running.send_signal(ends)
        assert running.stderr.read() == b""
        assert running.wait(timeout=60) == 128 + ends
    assert list(tmp_path.iterdir()) == []
