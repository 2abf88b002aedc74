"""What all processes of a child use together, measured twice a second by the init of its cell.

For machines where no cgroup can be made: limits per process do not add up, so N processes may use
N times as much. Between two looks a child can overshoot by what it can take in `INTERVAL_S`.
Format: proc(5).
"""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping
from typing import Any

from .context import Context

NAME = "polled_limits"
INTERVAL_S = 0.5

_PAGE_BYTES = resource.getpagesize()
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def probe() -> str:
    return ""  # /proc of its own comes with `scratch`


def apply(args: Mapping[str, Any], context: Context) -> None:
    """`memory_bytes`, `cpu_s`: the limits, which `exceeded` compares with."""
    context.polled = dict(args)


def exceeded(limits: Mapping[str, float]) -> str:
    """ "memory", "cpu" or "": which limit the processes of this pid namespace, but for pid 1 and
    with those that it has waited for, are over. `limits`: what `apply` was given."""
    waited_for = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = waited_for.ru_utime + waited_for.ru_stime
    memory_bytes = 0
    for name in os.listdir("/proc"):
        if not name.isdigit() or name == "1":
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                # After the name, which may hold anything: state is the third field.
                fields = file.read().rpartition(b") ")[2].split()
            with open(f"/proc/{name}/statm", "rb") as file:
                _, resident, shared, *_ = map(int, file.read().split())
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        cpu_s += sum(map(int, fields[11:15])) / _TICKS_PER_S  # own and waited-for, user and system
        memory_bytes += (resident - shared) * _PAGE_BYTES
    if memory_bytes > limits["memory_bytes"]:
        return "memory"
    return "cpu" if cpu_s > limits["cpu_s"] else ""
