"""The list of system calls: right numbers, refused in every child, whatever the machine."""

from __future__ import annotations

import os
import platform
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from sandbox import Ending
from sandbox.layers import seccomp

HEADERS = [
    (0, Path(f"/usr/include/{os.uname().machine}-linux-gnu/asm/unistd_64.h"), r"__NR_"),
    (1, Path("/usr/include/asm-generic/unistd.h"), r"__NR(?:3264)?_"),
]
if platform.machine() != "x86_64":
    HEADERS[0] = (0, Path("/usr/x86_64-linux-gnu/include/asm/unistd_64.h"), r"__NR_")
NAMED = {
    **seccomp._DENIED,
    **seccomp._ABSENT,
    **seccomp._NOTHING,
    **{name: numbers for name, (numbers, _) in seccomp._CHMODS.items()},
    **{name: numbers for name, (numbers, _) in seccomp._SETXATTRS.items()},
    **{
        name.lower(): getattr(seccomp, f"_{name}")
        for name in (
            "CLONE",
            "SOCKET",
            "SOCKETPAIR",
            "SETSOCKOPT",
            "GETSOCKOPT",
            "MMAP",
            "PREADV2",
            "SENDTO",
            "SENDMSG",
            "SENDMMSG",
            "IOCTL",
            "PERSONALITY",
            "SETRLIMIT",
            "FCNTL",
            "PRCTL",
            "LISTEN",
        )
    },
}


@pytest.mark.parametrize(("column", "header", "prefix"), HEADERS, ids=["x86_64", "aarch64"])
def test_the_numbers_are_those_of_the_systems_headers(
    column: int, header: Path, prefix: str
) -> None:
    if not header.exists():
        pytest.skip(f"there is no {header}")
    defined = {
        name: int(number)
        for name, number in re.findall(rf"#define {prefix}(\w+)\s+(\d+)\b", header.read_text())
        if name != "syscalls"
    }
    assert len(defined) > 250
    newest = max(defined.values())
    for name, numbers in NAMED.items():
        number = numbers[column]
        if name in defined:
            assert number == defined[name], name
        else:  # no such call there, or one that the header is too old for
            assert number is None or number > newest, name
    assert max(filter(None, (numbers[column] for numbers in NAMED.values()))) <= seccomp._LAST


def test_every_denied_call_is_refused_in_a_child(lab: Any) -> None:
    column = 0 if platform.machine() == "x86_64" else 1
    calls = {
        name: [numbers[column], *[-1] * 6]  # would do nothing but fail where it is not refused
        for name, numbers in seccomp._DENIED.items()
        if numbers[column] is not None
    }
    new_namespace = 0x10000000 | signal.SIGCHLD  # CLONE_NEWUSER
    calls["clone"] = [seccomp._CLONE[column], new_namespace, 0, 0, 0, 0]
    calls["personality"] = [seccomp._PERSONALITY[column], 0x0040000]  # ADDR_NO_RANDOMIZE
    calls["terminal"] = [seccomp._IOCTL[column], 0, 0x5412, 0]  # TIOCSTI
    unknown = {
        **{
            name: [numbers[column], 0, 0]
            for name, numbers in seccomp._ABSENT.items()
            if numbers[column] is not None
        },
        "newer": [seccomp._LAST + 1, -1, -1],
        "no such": [1000, 0],
    }
    allowed = {"personality?": [seccomp._PERSONALITY[column], 0xFFFFFFFF]}
    report = lab.do("syscalls", calls={**calls, **unknown, **allowed})
    assert report.error == ""
    found = report.value
    assert {name: found[name] for name in calls if found[name] != "EPERM"} == {}
    assert {found[name] for name in unknown} == {"ENOSYS"}
    assert found["personality?"] == "done"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x32 is of x86_64")
def test_a_call_by_another_entry_ends_the_process(lab: Any) -> None:
    getpid_of_x32 = 0x40000000 | 39
    report = lab.do("syscalls", calls={"x32": [getpid_of_x32]})
    assert (report.ending, report.signal) == (Ending.SIGNALED, signal.SIGSYS)
