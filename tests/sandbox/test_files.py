"""Files in (workspaces, mounts) and files out (outputs), for agents and programs, in each tier."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox import BlockingSandbox, Ending, Limits, SandboxSpec, SpecError
from sandbox.workspace import Templates, pack

ENV = {"PATH": "/usr/bin:/bin"}
TIERS = ("namespaces", "process")
OLD_NS = 1_000_000_000_123_456_789


@pytest.fixture(scope="module", params=TIERS)
def box(request: pytest.FixtureRequest, bare_python: str) -> Iterator[BlockingSandbox]:
    """Executes programs."""
    limits = Limits(scratch_bytes=2**20, scratch_files=300, file_bytes=2**20, workspace_bytes=2**21)
    spec = SandboxSpec(tier=request.param, env=ENV, limits=limits)
    with BlockingSandbox(spec, python=bare_python, reserve=1) as opened:
        yield opened


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
        "./link; cat bin/up; stat -c '%a %Y' data.txt bin; stat -c %a link bin/tool; "
        "test -d empty && ls | wc -l; pwd"
    )
    report = sh(box, script, workspace=template)
    assert report.exit_code == 0, report
    said = ["tool ran", "the data", "640 1000000000", "755 1000000000", "777", "755", "6"]
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
    if box.zygote.plan.tier == "namespaces":
        assert "limits.scratch_files" in report.error
    else:
        assert report.stdout_tail == "400\n"


def test_no_descriptor_of_the_template_is_left_in_the_child(
    box: BlockingSandbox, template: Path
) -> None:
    report = sh(box, "ls -l /proc/self/fd", workspace=template)
    assert "pipe:" in report.stdout_tail
    assert "memfd" not in report.stdout_tail
