"""Files in (workspaces, mounts) and files out (outputs), for agents and programs, in each tier."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox import (
    BlockingSandbox,
    Ending,
    Limits,
    SandboxSpec,
    SpecError,
    ZygoteFailed,
    kernel,
    outputs,
)
from sandbox import archive as archives
from sandbox.outputs import Order, collect, make_order, read
from sandbox.probe import Probe
from sandbox.workspace import Templates, pack

ENV = {"PATH": "/usr/bin:/bin"}
TIERS = ("namespaces", "process", "bwrap", "gvisor")
IN_CELLS = ("namespaces", "bwrap")
OLD_NS = 1_000_000_000_123_456_789
OLD = "1000000000.1234567890"


@pytest.fixture(scope="module", params=TIERS)
def box(
    request: pytest.FixtureRequest, bare_python: str, probed: Probe
) -> Iterator[BlockingSandbox]:
    """Executes programs."""
    skip_unless_given(request.param, probed)
    limits = Limits(scratch_bytes=2**20, scratch_files=300, file_bytes=2**20, workspace_bytes=2**21)
    spec = SandboxSpec(tier=request.param, env=ENV, limits=limits)
    with BlockingSandbox(spec, python=bare_python, reserve=1) as opened:
        yield opened


def skip_unless_given(tier: str, probed: Probe) -> None:
    if reason := probed.layers.get(tier, ""):
        pytest.skip(f"the tier {tier} is not to be had here: {reason}")


@pytest.fixture
def template(tmp_path: Path) -> Path:
    """A small project."""
    root = tmp_path / "template"
    (root / "bin").mkdir(parents=True)
    (root / "empty").mkdir()
    tool = root / "bin" / "tool"
    tool.write_text("#!/bin/sh\necho tool ran\n")
    tool.chmod(0o755)
    (root / "data.txt").write_text("the data\n")
    (root / "data.txt").chmod(0o640)
    (root / "link").symlink_to("bin/tool")
    (root / "bin" / "up").symlink_to("../data.txt")
    (root / os.fsdecode(b"odd\nname \xff")).write_bytes(b"\0\1")
    os.utime(root / "data.txt", ns=(OLD_NS, OLD_NS))
    os.utime(root / "bin", ns=(OLD_NS, OLD_NS))
    return root


def sh(box: BlockingSandbox, script: str, **options: Any) -> Any:
    return box.execute(["/bin/sh", "-c", script], **options)


def test_a_template_is_where_the_program_starts(box: BlockingSandbox, template: Path) -> None:
    script = (
        # Not `stat`, whose statx the gVisor of 2022 refuses.
        "./link; cat bin/up; find data.txt bin -maxdepth 0 -printf '%m %T@\\n'; "
        "find link bin/tool -maxdepth 0 -printf '%m\\n'; test -d empty && ls | wc -l; pwd"
    )
    report = sh(box, script, workspace=template)
    assert report.exit_code == 0, report
    said = ["tool ran", "the data", f"640 {OLD}", f"755 {OLD}", "777", "755", "6"]
    assert report.stdout_tail.splitlines()[:-1] == said
    assert str(template) not in report.stdout_tail


def test_a_template_is_the_childs_own_and_stays_as_it_is(
    box: BlockingSandbox, template: Path
) -> None:
    before = {path: path.lstat().st_mtime_ns for path in template.rglob("*")}
    script = "echo more >> data.txt && rm -r bin && echo new > new && cat data.txt"
    for _ in range(2):  # the second finds nothing of the first
        report = sh(box, script, workspace=template)
        assert (report.exit_code, report.stdout_tail) == (0, "the data\nmore\n"), report
    assert {path: path.lstat().st_mtime_ns for path in template.rglob("*")} == before
    assert sh(box, "ls").stdout_tail == "", "a run without a workspace has none"


def test_python_agents_get_it_too(lab: Any, template: Path) -> None:
    async def go() -> Any:
        zygote = await lab.zygote()
        return await zygote.run({"do": "read_file", "path": "data.txt"}, workspace=template)

    assert lab.run(go()).value == "the data\n"


def test_a_template_that_changes_is_packed_again(template: Path) -> None:
    templates = Templates(Limits())
    first = templates.packed(str(template))
    assert templates.packed(str(template)) is first
    (template / "bin" / "tool").write_text("#!/bin/sh\necho other\n")
    assert templates.packed(str(template)) is not first


def test_what_cannot_be_packed_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "template"

    def refused(what: str, limits: Limits | None = None) -> None:
        with pytest.raises(SpecError, match=what):
            pack(str(root), limits or Limits())

    refused("template' cannot be read: No such file")
    root.mkdir()
    os.mkfifo(root / "fifo")
    refused("fifo' is neither a file nor a folder")
    (root / "fifo").unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(root)
        listener.bind("socket")
        refused("socket' is neither")
    (root / "socket").unlink()
    for target in ("../outside", "/etc/passwd", "sub/../../outside"):
        (root / "link").symlink_to(target)
        refused("link' leads out of it")
        (root / "link").unlink()
    (root / "sub").mkdir()
    (root / "sub" / "out").symlink_to("..")
    (root / "chain").symlink_to("sub/out/..")
    refused("chain' leads out of it")
    (root / "chain").unlink()
    (root / "big").write_bytes(b"x" * 1000)
    (root / "bigger").write_bytes(b"x" * 1000)
    refused(r"bigger' .* 1999 bytes .*workspace_bytes", Limits(workspace_bytes=1999))
    refused(r"more than 3 files .*workspace_files", Limits(workspace_files=3))
    os.link(root / "big", tmp_path / "elsewhere")  # each name is a file of its own
    (root / "big").chmod(0o4755)
    assert pack(str(root), Limits(workspace_bytes=2000, workspace_files=4)).num_bytes > 2000


def test_a_workspace_that_cannot_be_packed_costs_no_child(
    box: BlockingSandbox, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match="missing"):
        sh(box, "true", workspace=tmp_path / "missing")
    assert sh(box, "true").exit_code == 0


def test_a_template_larger_than_the_scratch_ends_by_the_limits_name(
    box: BlockingSandbox, tmp_path: Path
) -> None:
    (tmp_path / "large").write_bytes(b"x" * (2**20 + 2**19))
    report = sh(box, "true", workspace=tmp_path)
    assert report.ending is Ending.SETUP_FAILED, report
    assert report.error.startswith("sandbox step 'workspace' failed: E")
    assert "'large'" in report.error
    assert "limits.scratch_bytes" in report.error or "limits.file_bytes" in report.error
    (tmp_path / "large").unlink()
    for n in range(400):
        (tmp_path / f"{n}").write_bytes(b"")
    report = sh(box, "ls | wc -l", workspace=tmp_path)
    if box.zygote.plan.tier in IN_CELLS:
        assert "limits.scratch_files" in report.error
    else:
        assert report.stdout_tail == "400\n"


def test_no_descriptor_of_the_template_is_left_in_the_child(
    box: BlockingSandbox, template: Path
) -> None:
    report = sh(box, "readlink /proc/self/fd/*", workspace=template)
    assert "pipe:" in report.stdout_tail
    assert "memfd" not in report.stdout_tail


def test_declared_outputs_come_out(box: BlockingSandbox) -> None:
    script = (
        "mkdir -p d/e; echo a > a.txt; echo b > b.txt; echo c > d/c; : > d/e/empty; echo n > no; "
        "printf '\\0\\377' > raw; chmod 000 raw 2>/dev/null; chmod 600 raw"
    )
    declared = ["*.txt", "d", "d/c", "raw", "missing", "d/*/nothing", "a.txt/inside"]
    report = sh(box, script, outputs=declared)
    assert dict(report.outputs) == {
        "a.txt": b"a\n",
        "b.txt": b"b\n",
        "d/c": b"c\n",
        "d/e/empty": b"",
        "raw": b"\0\xff",
    }
    assert report.outputs_missing == ("missing", "d/*/nothing", "a.txt/inside")
    assert report.outputs_refused == ()
    everything = sh(box, script, outputs=["."])
    assert set(everything.outputs) == {*report.outputs, "no"}


def test_outputs_come_out_however_the_child_ends(lab: Any) -> None:
    async def go(**data: Any) -> Any:
        zygote = await lab.zygote()
        wall_s = data.pop("wall_s", 20)
        return await zygote.run({"do": "leave_file", **data}, wall_s=wall_s, outputs=["left"])

    ends = {"return": "returned", "raise": "raised", "exit": "exited", "kill": "signaled"}
    for end, ending in ends.items():
        report = lab.run(go(end=end))
        assert (report.ending.value, dict(report.outputs)) == (ending, {"left": b"here"}), report
    report = lab.run(go(end="hang", wall_s=1.0))
    assert (report.ending, dict(report.outputs)) == (Ending.TIMEOUT, {"left": b"here"})
    assert report.written_bytes >= 4096


@pytest.mark.parametrize("way", [kernel.open_beneath, kernel.walk_beneath])
def test_what_lies_beneath_a_folder_is_opened_through_no_link(way: Any, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("own")
    (tmp_path / "link").symlink_to("folder")
    folder = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    with open(way(folder, "folder/file", os.O_RDONLY)) as file:
        assert file.read() == "own"
    for fd in (way(folder, ".", os.O_PATH), way(folder, "link", os.O_PATH | os.O_NOFOLLOW)):
        os.close(fd)
    wrong = {"link/file": errno.ELOOP, "link": errno.ELOOP, "folder/file/x": errno.ENOTDIR}
    for path, code in (wrong | {"no/file": errno.ENOENT}).items():
        with pytest.raises(OSError, match=rf"\[Errno {code}\]"):
            way(folder, path, os.O_RDONLY | os.O_NOFOLLOW)
    os.close(folder)
    root = os.open("/", os.O_PATH | os.O_DIRECTORY)
    with pytest.raises(OSError, match=rf"\[Errno {errno.EXDEV}\]"):
        way(root, "proc/version", os.O_RDONLY)
    os.close(root)


def test_what_hurts_is_refused_by_name(box: BlockingSandbox, bare_python: str) -> None:
    script = """
import os
os.mkdir("out"); os.chdir("out")
open("good", "w").write("good")
os.symlink("/etc/hostname", "link"); os.symlink(".", "folder link")
open("one", "w").write("x"); os.link("one", "two")
os.mkfifo("pipe")
for name in (b"new\\nline", b"\\xff\\xfe", b"\\x1b[31mred", b"bidi\\xe2\\x80\\xaetxt"):
    open(name, "w").close()
with open("sparse", "wb") as file:
    file.truncate(2**20)
for _ in range(150):
    os.mkdir("deep"); os.chdir("deep")
"""
    spec = box.zygote.spec
    report = box.execute([bare_python, "-I", "-c", script], outputs=["out", "out/folder link/good"])
    assert report.exit_code == 0, report
    assert dict(report.outputs).keys() == {"out/good", "out/sparse"}
    assert spec.limits.outputs_bytes > 2**20
    refused = dict(report.outputs_refused)
    deep = "/".join(["out", *["deep"] * 64])
    assert refused == {
        "out/link": "it is a symbolic link",
        "out/folder link": "it is a symbolic link",
        "out/folder link/good": "it lies behind a symbolic link",
        "out/one": "it is a hard link: a file of 2 names",
        "out/two": "it is a hard link: a file of 2 names",
        "out/pipe": "it is a pipe",
        r"out/new\nline": "its name is too long, or cannot be printed",
        r"out/\udcff\udcfe": "its name is too long, or cannot be printed",
        r"out/\x1b[31mred": "its name is too long, or cannot be printed",
        r"out/bidi\u202etxt": "its name is too long, or cannot be printed",
        deep: "it lies deeper than 64 folders",
    }


def test_outputs_are_bounded(lab: Any) -> None:
    async def go() -> tuple[Any, ...]:
        limits = Limits(outputs_bytes=1000, outputs_files=50)
        zygote = await lab.start("acts:act", limits=limits)
        try:
            few, many, pipes = [
                await zygote.run({"do": "leave_many", **data}, outputs=["."], wall_s=20)
                for data in (
                    {"count": 4, "size": 300},
                    {"count": 80, "size": 1},
                    {"count": 40, "size": -1},
                )
            ]
        finally:
            await zygote.close()
        return few, many, pipes

    few, many, pipes = lab.run(go())
    assert sorted(few.outputs) == ["0", "1", "2"]
    assert few.outputs_refused == (("3", "with it the outputs are larger than 1000 bytes"),)
    assert len(many.outputs) == 49, "the folder itself counts, too"
    assert many.outputs_refused == ((".", "it holds more than is looked at; the rest is left out"),)
    assert len(pipes.outputs_refused) == 40


def test_refusals_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    for n in range(130):
        os.mkfifo(tmp_path / "work" / f"{n}")
    found = read(collect(str(tmp_path), "work", make_order(["."], 1000, 1000)))
    assert len(found.refused) == 101
    assert found.refused[-1] == ("", "30 more")


def test_a_replaced_working_directory_is_not_followed(lab: Any) -> None:
    async def go() -> Any:
        zygote = await lab.zygote()
        act = {"do": "replace_work", "by": "/etc"}
        return await zygote.run(act, wall_s=20, outputs=["."])

    report = lab.run(go())
    assert (report.value, dict(report.outputs)) == ("replaced", {})
    ((path, why),) = report.outputs_refused
    assert path == "."
    assert "cannot be collected" in why or "openat2" in why
    assert list(lab.folder.glob("zygote-*/[0-9]*")) == []


SWAPPER = """
import os, sys
while True:
    os.rename("out", "kept")
    os.symlink(sys.argv[1], "out")
    os.unlink("out")
    os.rename("kept", "out")
    os.rename("out/file", "out/kept")
    os.symlink(sys.argv[1] + "/file", "out/file")
    os.unlink("out/file")
    os.rename("out/kept", "out/file")
"""


@pytest.mark.parametrize("way", [kernel.open_beneath, kernel.walk_beneath])
def test_collecting_holds_against_one_who_still_writes(
    way: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the tier process, a hostile import may have left somebody who does; in gVisor, a sibling
    may be one."""
    monkeypatch.setattr(kernel, "open_beneath", way)
    canary = tmp_path / "canary"
    canary.mkdir()
    (canary / "file").write_text("CANARY")
    work = tmp_path / "child" / "work"
    (work / "out").mkdir(parents=True)
    (work / "out" / "file").write_text("own")
    with subprocess.Popen([sys.executable, "-I", "-c", SWAPPER, canary], cwd=work) as swapper:
        found = set()
        for _ in range(300):
            got = read(collect(str(tmp_path), "child/work", make_order(["."], 1000, 100)))
            found |= set(got.files.values())
        assert swapper.poll() is None
        swapper.kill()
    assert found == {b"own"}


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/etc/passwd", "relative"),
        ("../up", "relative"),
        ("a/../b", "relative"),
        ("a//b", "relative"),
        ("a/", "relative"),
        ("", "relative"),
        ("a\0b", "printed"),
        ("a\nb", "printed"),
        ("x" * 2000, "too long"),
        ("a/**/b", r"\*\*"),
    ],
)
def test_what_cannot_be_declared(path: str, why: str) -> None:
    with pytest.raises(SpecError, match=f"outputs: .*{why}"):
        make_order([path], 1, 1)


def test_a_list_of_outputs_is_checked_before_a_child_is_spent(box: BlockingSandbox) -> None:
    with pytest.raises(SpecError, match="relative"):
        sh(box, "true", outputs=["/etc"])
    with pytest.raises(SpecError, match="a list of paths"):
        sh(box, "true", outputs="etc")
    with pytest.raises(SpecError, match="too many"):
        sh(box, "true", outputs=[f"{n}{'x' * 1000}" for n in range(100)])


def test_bytes_written_are_counted(box: BlockingSandbox) -> None:
    empty = sh(box, "true").written_bytes
    some = sh(box, "head -c 500000 /dev/zero > zeros; echo x > ~/more").written_bytes
    assert 500_000 <= some - empty <= 550_000


@pytest.mark.parametrize("tier", IN_CELLS)
def test_mounts_are_more_to_read_at_paths_of_their_own(
    tier: str, code: Path, bare_python: str, probed: Probe
) -> None:
    skip_unless_given(tier, probed)
    (code / "data").mkdir()
    (code / "data" / "file").write_text("shown\n")
    (code / "data" / "keys").mkdir()
    (code / "data" / "keys" / "key").write_text("hidden\n")
    (code / "alone").write_text("one file\n")
    spec = SandboxSpec(
        tier=tier,
        env=ENV,
        mounts={"/data/set": str(code / "data"), "/alone": str(code / "alone")},
        hidden=(str(code / "data" / "keys"),),
    )
    with BlockingSandbox(spec, python=bare_python) as opened:
        report = sh(opened, "cat /data/set/file /alone; ls /data/set /data/set/keys")
        assert report.stdout_tail == "shown\none file\n/data/set:\nfile\nkeys\n\n/data/set/keys:\n"
        report = sh(opened, f"echo x > /data/set/file; echo x > /data/new; ls {code}")
        assert report.stderr_tail.count("Read-only file system") == 2
        assert "No such file" in report.stderr_tail


@pytest.mark.parametrize(
    ("mounts", "why"),
    [
        ({"/usr/more": "/srv"}, "/usr is shown there"),
        ({"/data": "/no/such/folder"}, "there is no /no/such/folder"),
    ],
)
def test_a_mount_that_cannot_be_made_is_named(
    mounts: dict[str, str], why: str, bare_python: str
) -> None:
    spec = SandboxSpec(tier="namespaces", env=ENV, mounts=mounts)
    with (
        pytest.raises(ZygoteFailed, match=f"mounts: .*{why}"),
        BlockingSandbox(spec, python=bare_python),
    ):
        pass


def test_a_collection_that_fails_costs_the_outputs_and_not_the_report(
    box: BlockingSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the init, or this process in the tier `process`, cannot make sense of."""
    if box.zygote.plan.tier == "gvisor":
        pytest.skip("there an order that makes no sense would end the bridge")
    monkeypatch.setattr(Order, "encode", lambda order: b"[]")
    monkeypatch.setattr(outputs, "collect", lambda *_: fail_collecting())
    report = sh(box, "echo said; echo x > left; exit 3", outputs=["left", "other"])
    assert (report.ending, report.exit_code, report.stdout_tail) == (Ending.EXITED, 3, "said\n")
    assert report.written_bytes > 0
    assert dict(report.outputs) == {}
    assert [path for path, _ in report.outputs_refused] == ["left", "other"]
    assert all(why for _, why in report.outputs_refused)


@pytest.mark.parametrize(
    "index",
    [
        [],
        {},
        {"files": 1, "refused": [], "num_refused": 0, "missing": []},
        {"files": [["x", "1"]], "refused": [], "num_refused": 0, "missing": []},
        {"files": [["x", -1]], "refused": [], "num_refused": 0, "missing": []},
        {"files": [[1, 1]], "refused": [], "num_refused": 0, "missing": []},
        {"files": [["x", 2**80]], "refused": [], "num_refused": 0, "missing": []},
        {"files": [], "refused": [["x"]], "num_refused": "", "missing": 1},
    ],
)
def test_an_archive_that_makes_no_sense_is_one_kind_of_error(index: Any) -> None:
    """It may have come out of gVisor, whole and unchecked."""
    with pytest.raises(ValueError, match=r"archive|bytes|unpack"):
        read(archives.Writer("outputs").finish(index))


def fail_collecting() -> None:
    raise OSError("not here")
