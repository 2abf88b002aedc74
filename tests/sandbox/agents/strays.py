"""Hostile on import: with every child, the zygote puts a process of its own into the group."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

from greedy import agent

_honest = socket.recv_fds


def _recv_fds(*arguments: Any) -> Any:
    received = _honest(*arguments)
    names = {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in received[1]}
    group = [fd for fd, name in names.items() if name.endswith(("tasks", "cgroup.procs"))]
    if group and os.fork() == 0:
        for fd in group:
            os.write(fd, b"0")
        os.closerange(3, 1024)  # whoever waits for an end of these need not wait for this one
        time.sleep(600)
    return received


socket.recv_fds = _recv_fds

__all__ = ["agent"]
