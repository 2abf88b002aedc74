"""Network, IPC, host name and pid namespaces of the child's own: those of them that gVisor gives.

Entered by the child's init, which then forks to be pid 1 in them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .. import kernel
from . import loopback
from .context import Context

NAME = "some_namespaces"


def probe() -> str:
    try:
        apply({}, Context())
        loopback.apply({"ports": [1024]}, Context())
    except OSError as error:
        return f"they cannot be had, or not be used: {error}"
    pid = os.fork()
    if pid == 0:
        os._exit(int(os.getpid() != 1))
    return "they are given, but not used" if os.waitpid(pid, 0)[1] else ""


def apply(args: Mapping[str, Any], context: Context) -> None:
    kernel.unshare(
        kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS | kernel.CLONE_NEWPID
    )
