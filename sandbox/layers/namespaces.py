"""User, mount, pid, network, IPC and host name namespaces of one's own.

Entered by `fork_into` (the keeper, and each cell's init, are born in theirs), so there is nothing
left to apply but the host name.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping
from typing import Any

from .. import kernel
from .context import Context

NAME = "namespaces"
HOST_NAME = "agent"


def probe() -> str:
    """Two generations, as they are used: a keeper's namespaces, and a cell's within them."""
    uid, gid = os.getuid(), os.getgid()
    reader, writer = os.pipe()
    try:
        pid = kernel.fork_into(kernel.ALL_NAMESPACES)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return (
                f"there may be no more namespaces ({error}). Raise the sysctl "
                "user.max_user_namespaces, and the other user.max_*_namespaces"
            )
        return f"the kernel refuses new namespaces ({error}). {_hint()}"
    if pid == 0:
        try:
            kernel.map_user("self", uid, uid, gid)
            kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
            kernel.mount("proc", "/proc", "proc", 0, "subset=pid")
            inner = kernel.fork_into(kernel.ALL_NAMESPACES)
            if inner == 0:
                kernel.mount("tmpfs", "/proc", "tmpfs", 0)
                os._exit(0)
            if os.waitpid(inner, 0)[1] != 0:
                os.write(writer, b"nested namespaces may not mount")
        except OSError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    reason = os.read(reader, 1000).decode(errors="replace")
    os.waitpid(pid, 0)
    return f"namespaces are given, but not their use ({reason}). {_hint()}" if reason else ""


def apply(args: Mapping[str, Any], context: Context) -> None:
    kernel.set_host_name(HOST_NAME)


def _hint() -> str:
    if os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv"):
        return (
            "In a container: start it with --security-opt seccomp=unconfined --security-opt "
            "apparmor=unconfined --security-opt systempaths=unconfined"
        )
    apparmor = "/proc/sys/kernel/apparmor_restrict_unprivileged_userns"
    try:
        with open(apparmor) as file:
            if file.read().strip() == "1":
                return (
                    "AppArmor restricts user namespaces: give this interpreter, "
                    f"{os.path.realpath(sys.executable)}, a profile with 'userns,' "
                    "(docs/security.md has one), or set "
                    "kernel.apparmor_restrict_unprivileged_userns=0"
                )
    except OSError:
        pass
    return "See the sysctls user.max_user_namespaces and kernel.unprivileged_userns_clone"
