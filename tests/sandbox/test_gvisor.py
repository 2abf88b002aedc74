"""The tier `gvisor`: in runsc where it is, and its two halves without it where that can be.

`direct`: the bridge starts the relay as a plain process, which as root gives it the namespaces that
it would have in gVisor. So what goes over the frames is tested on every machine of root's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sandbox import (
    ChildReport,
    Ending,
    Limits,
    PlanError,
    SandboxSpec,
    Zygote,
    ZygoteFailed,
    launch,
    outputs,
)
from sandbox.frames import Breach, Incoming, Kind, Mux, Wire
from sandbox.layers import PROBE, bwrap, checks, gvisor, root
from sandbox.layers.environ import allowed
from sandbox.layers.root import Layout
from sandbox.plan import Step, plan
from sandbox.probe import Probe, probe

AGENTS = Path(__file__).parent / "agents"
ALL = Probe(dict.fromkeys((*PROBE, "gvisor"), ""), landlock_abi=7)
RUNSC = "runsc-sandbox"


def without_gvisor(
    args: Any, interpreter: Any, *, folder: str, argv: list[str], env: dict[str, str]
) -> tuple[list[str], list[str]]:
    """In place of `gvisor.prepare`."""
    words = [f"{name}={value}" for name, value in env.items()]
    return ["/usr/bin/env", "-i", *words, *argv], []


class Place:
    """Starts zygotes of the tier, and keeps one."""

    def __init__(self, kind: str, folder: Path, python: str) -> None:
        self.kind, self.folder, self.python = kind, folder, python
        self.runner = asyncio.Runner()
        self._zygote: Zygote | None = None
        self._num = 0

    async def start(self, target: str = "acts:act", **options: Any) -> Zygote:
        self._num += 1
        names = ("limits", "port", "readable", "hidden")
        spec = {name: options.pop(name) for name in names if name in options}
        options.setdefault("python_path", [str(AGENTS)])
        with pytest.MonkeyPatch.context() as patches:
            if self.kind == "direct":
                patches.setattr(gvisor, "prepare", without_gvisor)
                patches.setattr(bwrap, "FOLDER", str(self.folder / "box"))
                # Nobody else can read an interpreter in root's home.
                patches.setattr(root, "INSIDE_ID", 0)
            return await Zygote.start(
                SandboxSpec(tier="gvisor", env=allowed(os.environ), **spec),
                ALL,
                folder=self.folder / f"zygote-{self._num}",
                target=target,
                python=self.python,
                timeout_s=60.0,
                **options,
            )

    async def zygote(self) -> Zygote:
        if self._zygote is None or not self._zygote.is_alive:
            self._zygote = await self.start(limits=Limits(output_bytes=2**20))
        return self._zygote

    def do(self, do: str, **data: Any) -> ChildReport:
        wall_s = data.pop("wall_s", 60.0)
        env = data.pop("env", None)

        async def go() -> ChildReport:
            return await (await self.zygote()).run({"do": do, **data}, wall_s=wall_s, env=env)

        return self.runner.run(go())

    def close(self) -> None:
        if self._zygote is not None:
            self.runner.run(self._zygote.close())
        self.runner.close()


@pytest.fixture(scope="module", params=["runsc", "direct"])
def place(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    bare_python: str,
    probed: Probe,
) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("gvisor")
    if request.param == "runsc":
        if reason := probed.layers["gvisor"]:
            pytest.skip(f"the tier gvisor is not to be had here: {reason}")
    elif os.getuid() != 0:
        pytest.skip("outside gVisor only root is given a network namespace just like that")
    (folder / "box").mkdir()
    place = Place(request.param, folder, bare_python)
    yield place
    place.close()


def test_every_ending_has_its_name(place: Place) -> None:
    assert place.do("number").value == 0.25
    raised = place.do("raise")
    assert (raised.ending, raised.error) == (
        Ending.RAISED,
        r"ValueError: no \x1b[31mred\x1b[0m tape",
    )
    assert "in do_raise" in raised.traceback
    hard = place.do("exit_hard")
    assert (hard.ending, hard.exit_code) == (Ending.EXITED, 7)
    assert place.do("exit").stdout_tail == "going\n"
    killed = place.do("kill_self")
    assert (killed.ending, killed.signal) == (Ending.SIGNALED, 9)
    late = place.do("hang", wall_s=1.0)
    assert (late.ending, late.stdout_tail) == (Ending.TIMEOUT, "about to hang\n")
    assert place.do("hang_deaf", wall_s=1.0).ending is Ending.TIMEOUT
    assert place.do("nan").ending is Ending.BAD_RESULT
    assert place.do("forge", raw="not json").ending is Ending.BAD_RESULT
    assert place.do("flood", fd=1).ending is Ending.OUTPUT_LIMIT
    assert place.do("big_result", size=2**20 - 100).ending is Ending.RETURNED
    assert place.do("big_result", size=2**21).ending is Ending.RESULT_LIMIT
    assert place.do("number").ending is Ending.RETURNED


def test_output_arrives_whole_before_the_end_is_told(place: Place) -> None:
    text = "".join(f"{number}\n" for number in range(60_000))  # more than one window
    report = place.do("print", text=text)
    assert report.ending is Ending.RETURNED
    assert report.stdout_tail == report.stderr_tail
    assert report.stdout_tail.endswith("\n59999\n")


def test_what_it_leaves_running_is_killed_and_counted(place: Place, daemons: Any) -> None:
    report = place.do("daemon", name=daemons.name, count=2)
    assert (report.ending, report.num_killed) == (Ending.RETURNED, 2)
    assert place.do("leave_pipes_open").num_killed == 2
    assert daemons.pids() == []
    hanging = place.do("daemon_and_hang", name=daemons.name, wall_s=1.5)
    assert (hanging.ending, hanging.num_killed) == (Ending.TIMEOUT, 1)


def test_surroundings_are_clean(place: Place) -> None:
    reports = [place.do("surroundings", env={"KEY": f"key-{number}"}) for number in range(2)]
    for number, report in enumerate(reports):
        seen = report.value
        assert report.error == ""
        assert seen["environ"].pop("KEY") == f"key-{number}"
        assert set(seen["environ"]) <= {"HOME", "TMPDIR", *allowed(os.environ)}
        assert (seen["home_files"], seen["work_files"], seen["stdin"]) == ([], [], "")
        assert seen["user"][0] == [1000 if place.kind == "runsc" else 0] * 3
        assert len(seen["descriptors"]) <= 5
        for kind in ("CapPrm", "CapEff", "CapInh"):
            assert int(seen["status"][kind], 16) == 0
    assert reports[0].value["random"] != reports[1].value["random"]


def test_each_child_comes_by_a_listener_of_its_own(place: Place, door: Any) -> None:
    async def one(name: str, zygote: Zygote, port: int) -> ChildReport:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            said = (await reader.readexactly(2**20 + 5)).decode().strip()
            writer.write(f"{name} heard {len(said)} {said[-4:]}".encode() + b"." * 2**20)
            writer.close()

        async with door("namespaces", answer) as opened:
            act = {"do": "connect", "port": port, "say": "x" * 2**20 + f"{name:>4}"}
            return await zygote.run(act, on_listener=opened.on_listener, wall_s=60.0)

    async def go() -> list[ChildReport]:
        zygote = await place.start(port=8765, reserve=1, limits=Limits(result_bytes=2**21))
        try:
            return list(await asyncio.gather(*(one(name, zygote, 8765) for name in "abc")))
        finally:
            await zygote.close()

    reports = place.runner.run(go())
    assert [report.error for report in reports] == [""] * 3
    for name, report in zip("abc", reports, strict=True):
        assert report.value.rstrip(".") == f"{name} heard {2**20 + 4}    {name}"
        assert report.value.count(".") == 2**20


def test_more_connections_than_are_open_at_once(place: Place, door: Any, code: Path) -> None:
    (code / "many.py").write_text(
        "import socket\n"
        "def agent(data):\n"
        "    said = 0\n"
        "    ends = [socket.create_connection(('127.0.0.1', data['port'])) for _ in range(80)]\n"
        "    for end in ends:\n"
        "        end.sendall(b'hello\\n')\n"
        "        end.shutdown(socket.SHUT_WR)\n"
        "    for end in ends:\n"
        "        said += len(end.makefile('rb').read())\n"
        "        end.close()\n"
        "    return said\n"
    )

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read())
        writer.close()

    async def go() -> list[ChildReport]:
        zygote = await place.start("many:agent", port=8765, python_path=[str(code)])
        try:
            reports = []
            for _ in range(2):
                async with door("namespaces", answer) as opened:
                    took = opened.on_listener
                    reports.append(await zygote.run({"port": 8765}, on_listener=took, wall_s=60.0))
            return reports
        finally:
            await zygote.close()

    assert [report.value for report in place.runner.run(go())] == [480, 480]


def test_many_at_once_and_data_of_some_size(place: Place) -> None:
    async def go() -> list[ChildReport]:
        zygote = await place.start("acts:returns")
        try:
            large = {"value": 1.0, "image": "x" * 2**23}
            runs = [zygote.run(large), *(zygote.run({"value": number}) for number in range(8))]
            return list(await asyncio.gather(*runs))
        finally:
            await zygote.close()

    assert [report.value for report in place.runner.run(go())] == [1.0, *range(8)]


def test_an_import_that_fails_brings_its_traceback(place: Place) -> None:
    with pytest.raises(ZygoteFailed, match="weights are") as caught:
        place.runner.run(place.start("broken_import:agent"))
    assert "in _load_weights" in caught.value.traceback


def test_files_are_those_of_the_plan(place: Place, code: Path) -> None:
    if place.kind == "direct":
        pytest.skip("files are gVisor's part")
    (code / "open.txt").write_text("for all")
    (code / "hidden").mkdir()
    (code / "hidden" / "key.txt").write_text("hush")
    shown, hidden, outside = code / "open.txt", code / "hidden" / "key.txt", "/etc/shadow"

    async def go() -> list[ChildReport]:
        zygote = await place.start(readable=[str(code)], hidden=[str(code / "hidden")])
        try:
            read = {"do": "read", "paths": [str(shown), str(hidden), outside, __file__]}
            write = {"do": "write", "paths": ["mine", str(code / "new"), "/usr/new", "/new"]}
            return [await zygote.run(act) for act in (read, write)]
        finally:
            await zygote.close()

    read, written = (report.value for report in place.runner.run(go()))
    assert read == {
        str(shown): "for all",
        **dict.fromkeys((str(hidden), outside, __file__), "ENOENT"),
    }
    assert written.pop("mine") == "done"
    assert set(written.values()) <= {"EROFS", "EACCES"}
    assert sorted(path.name for path in code.iterdir()) == ["hidden", "open.txt"]


def test_files_come_in_and_go_out(place: Place, tmp_path: Path) -> None:
    """More than a frame, and than what may be on the way; and beside others."""
    content = os.urandom(700_000)
    (tmp_path / "large").write_bytes(content)

    async def go() -> list[ChildReport]:
        zygote = await place.zygote()
        told = {"do": "read_file", "path": "small"}
        children = []
        for n in range(3):
            folder = tmp_path / f"{n}"
            folder.mkdir()
            (folder / "small").write_text(f"{n}")
            (folder / "large").write_bytes(content)
            run = zygote.run(told, workspace=folder, outputs=["*", "none"], wall_s=60.0)
            children.append(run)
        hangs = {"do": "leave_file", "end": "hang"}
        children.append(zygote.run(hangs, outputs=["left"], wall_s=5.0))
        gone = {"do": "replace_work", "by": "/etc"}
        children.append(zygote.run(gone, outputs=["passwd"], wall_s=60.0))
        return await asyncio.gather(*children)

    *three, hung, gone = place.runner.run(go())
    for n, report in enumerate(three):
        assert report.value == f"{n}", report
        assert report.outputs == {"large": content, "small": f"{n}".encode()}
        assert (report.outputs_missing, report.outputs_refused) == (("none",), ())
    assert (hung.ending, hung.outputs) == (Ending.TIMEOUT, {"left": b"here"})
    assert (gone.value, gone.outputs) == ("replaced", {})
    ((path, why),) = gone.outputs_refused
    assert path == "passwd"
    assert "cannot be collected" in why


def test_an_archive_that_comes_has_a_bound() -> None:
    reader, writer = os.pipe()
    mux = Mux(Wire(reader, writer, 100))
    incoming = Incoming(mux, 7, 10)
    mux.dispatch(Kind.DATA, 7, b"six...")
    with pytest.raises(Breach, match="more bytes than were asked for"):
        mux.dispatch(Kind.DATA, 7, b"five.")
    with pytest.raises(Breach, match="credit"):
        mux.dispatch(Kind.CREDIT, 7, b"\0\0\0\1")
    mux.dispatch(Kind.EOF, 7, b"")
    assert incoming.whole is not None
    with pytest.raises(ValueError, match="not an archive"):  # whole, and not yet looked at
        outputs.read(incoming.whole)
    for fd in (reader, writer):
        os.close(fd)


def test_nothing_of_the_host_is_reached_by_network(place: Place) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as host:
        port = host.getsockname()[1]
        act = {"port": port, "free_port": port}
        addresses = {"host": ["127.0.0.1", port], "outside": ["192.0.2.1", 443]}
        found = place.do("sockets", addresses=addresses, **act).value
        host.setblocking(False)
        with pytest.raises(BlockingIOError):
            host.accept()
    assert found["host"] == "ECONNREFUSED"
    assert found["outside"] in {"ENETUNREACH", "EHOSTUNREACH"}
    assert found["packet"] == found["netlink"] == found["raw"] == "EPERM"


def alive(family: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def test_cancelling_ends_the_child_and_closing_everything(
    place: Place,
    below: Callable[..., list[psutil.Process]],
    eventually: Callable[..., None],
) -> None:
    async def go() -> tuple[ChildReport, list[psutil.Process], Path]:
        zygote = await place.start()
        task = asyncio.ensure_future(zygote.run({"do": "hang"}, wall_s=60.0))
        other = asyncio.ensure_future(zygote.run({"do": "hang"}, wall_s=60.0))
        assert (await zygote.run({"do": "number"})).value == 0.25
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        family = below(zygote.guardian_pid)
        assert family
        await zygote.close()
        return await other, family, zygote._folder

    report, family, folder = place.runner.run(go())
    assert report.ending is Ending.LOST
    eventually(lambda: not alive(family), "all are gone")
    assert not folder.exists()


HOST = """
import asyncio, os, sys
from pathlib import Path
from sandbox import SandboxSpec, Zygote
from sandbox.layers import checks
from sandbox.probe import probe

async def main():
    zygote = await Zygote.start(
        SandboxSpec(tier="gvisor", env={"PATH": os.environ["PATH"]}), probe(checks("gvisor")),
        folder=Path(sys.argv[1]) / "zygote", target="acts:act", python_path=[sys.argv[2]],
        timeout_s=60)
    child = asyncio.ensure_future(zygote.run({"do": "hang"}))
    await zygote.run({"do": "number"})
    print(zygote.guardian_pid, flush=True)
    await child

asyncio.run(main())
"""


@pytest.mark.parametrize("victim", ["the host", "the bridge", "runsc"])
def test_the_death_of_any_of_them_ends_everything(
    victim: str,
    bare_python: str,
    probed: Probe,
    tmp_path: Path,
    below: Callable[..., list[psutil.Process]],
    eventually: Callable[..., None],
) -> None:
    if reason := probed.layers["gvisor"]:
        pytest.skip(f"the tier gvisor is not to be had here: {reason}")
    words = [bare_python, "-c", HOST, str(tmp_path), str(AGENTS)]
    host = subprocess.Popen(
        words, cwd=AGENTS.parents[2], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert host.stdout is not None
        bridge = psutil.Process(int(host.stdout.readline()))
        family = [bridge, *below(bridge.pid)]
        assert [p for p in family if RUNSC in p.cmdline()[:1]], "the kernel that they run on"
        (run,) = [p for p in family if p.ppid() == bridge.pid]
        {"the host": host, "the bridge": bridge, "runsc": run}[victim].kill()
        host.wait(20)
    finally:
        host.kill()
        host.wait()
        assert host.stdout is not None
        host.stdout.close()

    eventually(lambda: not alive(family), "all are gone")


def test_without_the_program_it_is_an_error_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = probe(checks("gvisor"))
    assert "install gVisor" in found.layers["gvisor"]
    with pytest.raises(PlanError, match="'gvisor' is not to be had here: gvisor: there is no"):
        plan(SandboxSpec(tier="gvisor"), found)


def test_a_program_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "runsc").write_text("#!/bin/sh\necho 'unknown platform: x' >&2\nexit 128\n")
    (tmp_path / "runsc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert "unknown platform: x" in probe(checks("gvisor")).layers["gvisor"]


def test_the_plan_asks_nothing_of_the_hosts_kernel() -> None:
    spec = SandboxSpec(tier="gvisor", readable=("/srv",), hidden=("/srv/keys",), port=8080)
    made = plan(spec, Probe({"gvisor": ""}))
    args = {"readable": ["/srv"], "hidden": ["/srv/keys"], "scratch_bytes": 2**29}
    assert made.outer == (Step("gvisor", args),)
    assert made.root == ()
    assert [step.layer for step in made.zygote] == [
        *("unprivileged", "no_new_privs", "rlimits", "seccomp")
    ]
    assert made.cell == (Step("some_namespaces", {}), Step("loopback", {"ports": [8080]}))
    assert [step.layer for step in made.child] == [
        *("session", "descriptors", "environ", "randomness", "rlimits"),
        *("capabilities", "no_new_privs", "seccomp"),
    ]
    assert len(made.weaknesses) == 2
    assert "no cgroups in gVisor" in made.weaknesses[1]
    with pytest.raises(PlanError, match="cgroups cannot be required in the tier 'gvisor'"):
        plan(SandboxSpec(tier="gvisor", cgroups="require"), ALL)


def test_the_bundle_and_the_command_are_values() -> None:
    shown = Layout(("/usr",), {"/bin": "usr/bin"})
    made = gvisor.config(
        shown,
        ["/usr/keys", sys.executable],
        argv=["/usr/bin/x"],
        env={"A": "b"},
        scratch_bytes=99,
        nothing="/f/nothing",
    )
    assert made["root"] == {"path": "rootfs", "readonly": True}
    assert made["process"]["args"] == ["/usr/bin/x"]
    assert made["process"]["env"] == ["A=b"]
    assert [(one["destination"], one["type"], one.get("options")) for one in made["mounts"]] == [
        ("/proc", "proc", None),
        ("/usr", "bind", ["rbind", "ro", "nosuid", "nodev"]),
        ("/usr/keys", "tmpfs", ["ro", "nosuid", "nodev", "mode=0555"]),
        (sys.executable, "bind", ["rbind", "ro", "nosuid", "nodev"]),
        ("/box", "tmpfs", ["nosuid", "nodev", "size=99"]),
        ("/tmp", "tmpfs", ["nosuid", "nodev", "size=99"]),
    ]
    common = ["/bin/runsc", "--root=/f/state", "--network=none", "--ignore-cgroups"]
    assert gvisor.command("/bin/runsc", "/f", "n", as_root=True) == (
        [*common, "run", "--bundle=/f/bundle", "n"],
        [*common, "delete", "--force", "n"],
    )
    assert "--rootless" in gvisor.command("/bin/runsc", "/f", "n", as_root=False)[0]


@pytest.mark.parametrize(
    ("hostile", "complaint"),
    [
        ("frame(200, 0, b'')", "a frame of the kind 200"),
        ("struct.pack('!BII', 10, 4, 2**31)", "a frame of 2147483648 bytes"),
        ("frame(10, 4, b'x' * 100_000)", "a chunk of 100000 bytes"),
        ("frame(7, 2, b'{}')", "a child that there is not"),
        ("frame(5, 1, b'') * 2", "an unexpected frame of the kind READY"),
        ("frame(7, 1, b'x' * 100_000)", "an unexpected frame of the kind STATUS"),
        ("frame(8, 2**31 + 1, bytes([0, 0, 0, 1]))", "a listener that there is not"),
        ("frame(6, 1, b'') + frame(8, 7, bytes([0, 0, 0, 1]))", "a connection with the number 7"),
        (
            "frame(6, 1, b'') + b''.join(frame(8, 2**31 + n, bytes([0, 0, 0, 1]))"
            " for n in range(300))",
            "more connections",
        ),
        ("frame(11, 4, b'xxxxxx')", "a credit that is not a number"),
        ("frame(1, 1, b'')", "an unexpected frame of the kind SETTINGS"),
    ],
)
def test_a_relay_that_breaks_the_rules_ends_everything_and_is_named(
    hostile: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in gVisor may have become hostile as a whole: nothing outside may come to harm."""
    if os.getuid() != 0:
        pytest.skip("outside gVisor only root is given a network namespace just like that")
    program = (
        "import os, struct, sys, time\n"
        "def frame(kind, number, payload):\n"
        "    return struct.pack('!BII', kind, number, len(payload)) + payload\n"
        "def write(raw):\n"
        "    sys.stdout.buffer.write(raw); sys.stdout.flush()\n"
        f"write(frame(4, 0, {json.dumps({'ready': True}).encode()!r}))\n"
        "seen = b''\n"
        "while frame(2, 1, b'') not in seen:\n"
        "    seen += os.read(0, 65536)\n"
        f"write({hostile})\n"
        "os.read(0, 65536)\n"
        "time.sleep(0.5)\n"
    )
    monkeypatch.setattr(
        launch.gvisor, "prepare", lambda *_, **__: ([sys.executable, "-c", program], [])
    )

    async def go() -> tuple[ChildReport, str]:
        spec = SandboxSpec(tier="gvisor", env=allowed(os.environ))
        zygote = await Zygote.start(
            spec, ALL, folder=tmp_path / "zygote", target="acts:act", timeout_s=30.0
        )
        report = await zygote.run({"do": "number"}, wall_s=5.0)
        await zygote.gone()
        tail = zygote._output.tail()
        await zygote.close()
        return report, tail

    report, tail = asyncio.run(go())
    assert report.ending is Ending.LOST
    assert "the relay did not keep to the rules: " in tail
    assert complaint in tail


def test_nothing_of_the_hosts_changes_hands(place: Place) -> None:
    """As root, runsc gives its standard streams to nobody: /dev/null must not be among them."""

    def owners() -> dict[str, tuple[int, int, int]]:
        found = {path: Path(path).stat() for path in ("/dev/null", "/dev/zero", str(place.folder))}
        return {path: (each.st_uid, each.st_gid, each.st_mode) for path, each in found.items()}

    before = owners()
    probe(checks("gvisor"))
    assert place.do("number").value == 0.25
    assert owners() == before
