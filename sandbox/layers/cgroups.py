"""Into the group that the caller has made: see `sandbox.cgroups`.

Applied by the zygote before it imports the agent, and by a child's process before anything else, so
that whatever descends from them is in the group from its birth on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .. import cgroups
from .context import Context

NAME = "cgroups"
_MIB = 2**20


def probe() -> str:
    """Makes groups, has a process enter one, and removes them."""
    try:
        place = cgroups.find()
    except cgroups.NoGroups as error:
        return str(error)
    limits = {"memory_bytes": 64 * _MIB, "processes": 4}
    try:
        groups = cgroups.Groups(place, zygote=limits, child=limits)
    except OSError as error:
        return f"v{place.version}: no group can be made: {error}; {cgroups.HINT}"
    try:
        group = groups.new()
        fds = group.enter()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                apply(limits, Context(group=fds))
                code = 0
            finally:
                os._exit(code)
        for fd in fds:
            os.close(fd)
        if os.waitpid(pid, 0)[1] != 0 or not group.usage().cpu_s:
            return f"v{place.version}: no process can be put into a group; {cgroups.HINT}"
    except OSError as error:
        return f"v{place.version}: groups cannot be used: {error}; {cgroups.HINT}"
    finally:
        cgroups.remove_all(groups.folders)
    return ""


def apply(args: Mapping[str, Any], context: Context) -> None:
    """`args`, the limits, are what the caller has made the group with."""
    if not context.group:
        raise ValueError("there is no group to enter")
    for fd in context.group:
        os.write(fd, b"0")
        os.close(fd)
    context.group.clear()
