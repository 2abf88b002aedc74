"""The tier `bwrap`: the command as a value, and where there is no such program."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from sandbox import Ending, PlanError, SandboxSpec
from sandbox.layers import PROBE, bwrap, checks
from sandbox.layers.root import Layout
from sandbox.plan import Step, plan
from sandbox.probe import Probe, probe

ALL = Probe(dict.fromkeys((*PROBE, "bwrap"), ""), landlock_abi=7)


def test_the_command_shows_what_the_plan_names_and_nothing_else() -> None:
    shown = Layout(("/opt/python", "/usr"), {"/bin": "usr/bin"})
    common = [
        *("--as-pid-1", "--die-with-parent"),
        *("--dir", "/opt", "--ro-bind", "/opt/python", "/opt/python"),
        *("--dir", "/", "--ro-bind", "/usr", "/usr"),
        *("--proc", "/proc", "--dev", "/dev", "--dir", "/box", "--symlink", "usr/bin", "/bin"),
        *("--tmpfs", "/usr/keys", "--remount-ro", "/usr/keys"),
        *("--remount-ro", "/", "--chdir", "/box", "--"),
    ]
    apart = ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-net"]
    apart += ["--unshare-cgroup-try", "--cap-drop", "ALL"]
    assert bwrap.command("/bin/bwrap", shown, ["/usr/keys"], as_root=False) == [
        "/bin/bwrap",
        *apart,
        "--unshare-user",
        *common,
    ]
    kept = [f"CAP_{name}" for name in ("SYS_ADMIN", "SETUID", "SETGID")]
    assert bwrap.command("/bin/bwrap", shown, ["/usr/keys"], as_root=True) == [
        "/bin/bwrap",
        *apart,
        *(word for name in kept for word in ("--cap-add", name)),
        *common,
    ]


def test_the_plan_is_that_of_namespaces_within_one_step() -> None:
    fields: dict[str, Any] = {
        "readable": ("/srv",),
        "hidden": ("/srv/keys",),
        "port": 8080,
        "allow": ["a.example:443"],
        "mounts": {"/data": "/opt/sets"},
    }
    made = plan(SandboxSpec(tier="bwrap", **fields), ALL)
    inner = plan(SandboxSpec(tier="namespaces", **fields), ALL)
    shown = {"readable": ["/srv", "/opt/sets"], "hidden": ["/srv/keys"]}
    assert made.outer == (Step("bwrap", shown),)
    assert made.group("child") is not None
    assert (made.tier, made.weaknesses) == ("bwrap", inner.weaknesses)
    assert made.allow == inner.allow
    for stage in ("root", "zygote", "cell", "child", "egress"):
        assert getattr(made, stage) == getattr(inner, stage)
    assert str(made).splitlines()[1].startswith("outer   bwrap")
    for layer in ("bwrap", "landlock", "namespaces"):
        refused = Probe({**ALL.layers, layer: "not here"}, landlock_abi=7)
        with pytest.raises(PlanError, match=f"'bwrap' .*{layer}: not here"):
            plan(SandboxSpec(tier="bwrap"), refused)


def test_without_the_program_it_is_an_error_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = probe(checks("bwrap"))
    assert "install bubblewrap" in found.layers["bwrap"]
    with pytest.raises(PlanError, match="'bwrap' is not to be had here: bwrap: there is no"):
        plan(SandboxSpec(tier="bwrap"), found)


def test_a_program_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: No permissions' >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = probe(checks("bwrap")).layers["bwrap"]
    assert "bwrap: No permissions" in found
    assert "AppArmor" in found


@pytest.mark.parametrize("lab", ["bwrap"], indirect=True)
def test_what_is_started_is_in_namespaces_of_bwrap_and_nobodys(
    lab: Any, below: Callable[..., list[psutil.Process]]
) -> None:
    assert lab.do("number").ending is Ending.RETURNED
    around = lab.run(lab.zygote()).guardian_pid
    family = [
        process
        for name in ("guard", "keeper", "zygote")
        for process in below(around, f"sandbox-{name}")
    ]
    assert len(family) == 3
    for process in family:
        folder = Path(f"/proc/{process.pid}")
        for kind in ("mnt", "pid", "net", "ipc", "uts"):
            assert (folder / "ns" / kind).readlink() != Path(f"/proc/self/ns/{kind}").readlink()
        assert process.uids().real == (os.getuid() or bwrap.NOBODY)
    status = Path(f"/proc/{family[0].pid}/status").read_text()
    assert "CapEff:\t0000000000000000" in status, "the guardian has nothing left of root's"
