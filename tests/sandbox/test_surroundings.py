"""What a child finds around it: variables, folders, descriptors, limits, and nobody's secrets."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from sandbox import ChildReport, Ending, Limits, SandboxSpec, SpecError
from sandbox.layers import namespaces, root, scratch
from sandbox.layers.environ import allowed


def test_the_environment_holds_the_allowlist_and_what_the_run_was_given(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-of-the-host")
    report = lab.do("surroundings", env={"OPENAI_API_KEY": "key-of-this-run"})
    seen = report.value
    assert seen["environ"].pop("OPENAI_API_KEY") == "key-of-this-run"
    assert set(seen["environ"]) <= {"HOME", "TMPDIR", *allowed(os.environ)}
    assert "canary" not in str(seen)
    assert "key-of-this-run" not in seen["proc_environ"], "nothing was exec'd with the run's key"
    for name in ("PYTHON", "LD_", "VIRTUAL_ENV", "USER=", "SSH"):
        assert name not in seen["proc_environ"]


def test_home_and_working_directory_are_private_and_gone_afterwards(lab: Any) -> None:
    first, second = (lab.do("surroundings").value for _ in range(2))
    for seen in (first, second):
        folder = Path(seen["home"]).parent
        assert (seen["cwd"], seen["tmp"]) == (str(folder / "work"), str(folder / "tmp"))
        assert (seen["home_files"], seen["work_files"]) == ([], [])
        assert seen["umask"] == 0o077
        assert not folder.exists()
        if lab.tier == "process":
            assert folder.parent.parent == lab.folder
        else:  # a tmpfs of the child's own, at the same place in every child
            assert str(folder) == scratch.BOX
    assert (first["home"] != second["home"]) == (lab.tier == "process")
    assert [path.name for path in lab.folder.glob("*/*")] == ["zygote"]


def test_descriptors_session_and_privileges(lab: Any) -> None:
    seen = lab.do("surroundings").value
    # 4 is the listing itself
    assert [entry.split()[0] for entry in seen["descriptors"]][:4] == ["0", "1", "2", "3"]
    assert len(seen["descriptors"]) <= 5
    assert [entry.split()[1] for entry in seen["descriptors"]][1:4] == ["pipe"] * 3
    assert seen["stdin"] == ""
    assert seen["session_is_own"]
    assert seen["status"]["NoNewPrivs"] == "1"
    assert seen["status"]["Seccomp"] == "2"
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        if (lab.tier, kind) != ("process", "CapBnd") or os.getuid() == 0:  # others may not
            assert int(seen["status"][kind], 16) == 0, f"{kind}: no capability, for root neither"
    assert not seen["torch"]
    assert seen["path_of_sandbox"] == [], "an agent's own module `sandbox` is not shadowed"


def test_user_processes_and_host_name_are_those_of_the_tier(lab: Any) -> None:
    seen = lab.do("surroundings").value
    if lab.tier == "process":
        assert seen["user"][0] == [os.getuid()] * 3
        assert os.getpid() in seen["processes"]
        assert seen["host_name"] == socket.gethostname()
    else:
        assert seen["user"][:2] == [[root.INSIDE_ID] * 3] * 2
        assert len(seen["processes"]) == 1, "its own"
        assert seen["host_name"] == namespaces.HOST_NAME


def test_no_process_around_a_child_can_be_looked_into(
    lab: Any, below: Callable[..., list[psutil.Process]]
) -> None:
    """Nor any other of the same user, with the user's keys in its environment."""

    async def go() -> ChildReport:
        zygote = await lab.zygote()
        around = [os.getpid(), zygote.guardian_pid]
        around += [process.pid for process in below(zygote.guardian_pid)]
        return await zygote.run({"do": "look_into", "pids": around})

    found = lab.run(go()).value
    assert len(found) >= 12
    errors = {"EACCES", "EPERM"} if lab.tier == "process" else {"ENOENT"}
    assert set(found.values()) <= errors


def test_limits_are_those_of_the_spec(lab: Any) -> None:
    expected = {
        "RLIMIT_CPU": [77, 78],
        "RLIMIT_AS": [2**31] * 2,
        "RLIMIT_NOFILE": [99] * 2,
        "RLIMIT_FSIZE": [12345] * 2,
        "RLIMIT_CORE": [1] * 2,
    }
    if lab.tier == "namespaces":
        expected |= {"RLIMIT_NPROC": [55] * 2, "RLIMIT_SIGPENDING": [1024] * 2}

    async def go() -> ChildReport:
        zygote = await lab.start(
            "acts:act",
            limits=Limits(
                cpu_s=77, memory_bytes=2**31, open_files=99, file_bytes=12345, processes=55
            ),
        )
        try:
            return await zygote.run({"do": "surroundings", "limits": list(expected)})
        finally:
            await zygote.close()

    assert lab.run(go()).value["limits"] == expected


def test_children_do_not_draw_the_same_random_numbers(lab: Any) -> None:
    numbers = {lab.do("surroundings").value["random"] for _ in range(3)}
    assert len(numbers) == 3


def test_nothing_of_another_run_is_in_a_childs_memory(lab: Any) -> None:
    """Nor of one that runs at the same time: the zygote that both come from reads no request."""
    secret = "sk-" + os.urandom(24).hex()

    async def go() -> ChildReport:
        zygote = await lab.zygote()
        # the same request, so that the search is one that can find it
        own = zygote.run({"do": "own_memory", "needle": secret[::-1], "bait": secret})
        assert (await own).value is True
        carrier = asyncio.ensure_future(
            zygote.run({"do": "hang", "secret": secret}, env={"KEY": secret}, wall_s=3.0)
        )
        await zygote.run({"do": "print", "text": secret}, env={"KEY": secret})
        report = await zygote.run({"do": "own_memory", "needle": secret[::-1]})
        carrier.cancel()
        await asyncio.gather(carrier, return_exceptions=True)
        return report

    report = lab.run(go())
    assert (report.ending, report.value) == (Ending.RETURNED, False)


def test_what_cannot_be_a_variable_is_refused_by_name(lab: Any) -> None:
    for env in ({"A=B": "x"}, {"A": "x\0y"}, {"": "x"}, {"A": 1}):
        with pytest.raises(SpecError):
            lab.do("number", env=env)
    with pytest.raises(SpecError, match="LD_PRELOAD"):
        allowed({"LD_PRELOAD": "evil.so"}, ["LD_PRELOAD"])
    with pytest.raises(SpecError, match="PYTHONPATH"):
        SandboxSpec(env={"PYTHONPATH": "/tmp"})
