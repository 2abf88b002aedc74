"""Agents that take what limits per process do not see. Loaded by zygotes, in a bare interpreter."""

from __future__ import annotations

import errno
import os
import signal
import time
from typing import Any

MIB = 2**20


def agent(data: dict[str, Any]) -> Any:
    return globals()[f"do_{data['do']}"](data)


def _family(num: int, part: Any) -> list[int]:
    """The exit codes, negative for signals, of `num` processes that ran `part` side by side."""
    pids = []
    for _ in range(num):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                part()
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def do_hold(data: dict[str, Any]) -> list[int]:
    """Each process stays below every limit of one; the parent goes on whatever becomes of them."""

    def part() -> None:
        kept = bytearray(b"x") * (data["mib"] * MIB)
        time.sleep(data["s"])
        del kept

    return _family(data["num"], part)


def do_fork(data: dict[str, Any]) -> str:
    try:
        for _ in range(1000):
            if os.fork() == 0:
                time.sleep(60)
                os._exit(0)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "1000 processes"


def do_burn_unwaited(data: dict[str, Any]) -> str:
    """In children that nobody waits for, one after the other."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for _ in range(data["num"]):
        reader, writer = os.pipe()
        if os.fork() == 0:
            until = time.process_time() + 0.2
            while time.process_time() < until:
                pass
            os._exit(0)
        os.close(writer)
        os.read(reader, 1)
        os.close(reader)
    return "burnt"


def do_nothing(data: dict[str, Any]) -> str:
    return "nothing"


def do_wait(data: dict[str, Any]) -> None:
    print("waiting", flush=True)
    time.sleep(600)
