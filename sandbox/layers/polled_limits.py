"""What all processes of a child use together, measured twice a second by the init of its cell.

For machines where no cgroup can be made: limits per process do not add up, so N processes may use
N times as much. And for connections that nobody has accepted, which have no descriptor, and are in
no cgroup's account either. Between two looks a child can overshoot by what it can take in
`INTERVAL_S`. Format: proc(5).
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
from collections.abc import Mapping
from typing import Any

from .context import Context

NAME = "polled_limits"
INTERVAL_S = 0.5

_PAGE_BYTES = resource.getpagesize()
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_SOCKET_BYTES = 4096
"""What the kernel takes for a TCP socket, near enough."""
MAX_TCP_SOCKETS = 8192
"""The machine has only so many whose processes have closed them (net.ipv4.tcp_max_orphans, 131,072
on 8 GiB); past these, answers are cut off, everybody's."""
_MAX_COUNTS_BYTES = 4096


def probe() -> str:
    return ""  # /proc of its own comes with `scratch`


def apply(args: Mapping[str, Any], context: Context) -> None:
    """`memory_bytes`, `cpu_s`: the limits, which `exceeded` compares with; `sockets_only`: where a
    group counts all else."""
    context.polled = dict(args)


def exceeded(limits: Mapping[str, float]) -> str:
    """ "memory", "cpu", "sockets" or "": which limit the processes of this pid namespace, but for
    pid 1 and with those that it has waited for, are over. `limits`: what `apply` was given."""
    memory_bytes, cpu_s = (0, 0.0) if limits["sockets_only"] else _used_by_processes()
    num_sockets = _num_tcp_sockets()
    if memory_bytes + _SOCKET_BYTES * num_sockets > limits["memory_bytes"]:
        return "memory"
    if num_sockets > MAX_TCP_SOCKETS:
        return "sockets"
    return "cpu" if cpu_s > limits["cpu_s"] else ""


def _used_by_processes() -> tuple[int, float]:
    """Bytes of memory and seconds of CPU time."""
    memory_bytes = 0
    waited_for = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = waited_for.ru_utime + waited_for.ru_stime
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
    return memory_bytes, cpu_s


def _num_tcp_sockets() -> int:
    """Of this network namespace."""
    num = 0
    for fd, protocol in _socket_counts():
        lines = [line.split() for line in os.pread(fd, _MAX_COUNTS_BYTES, 0).splitlines()]
        num += sum(int(inuse) for kind, _, inuse, *_ in lines if kind == protocol)
    return num


@functools.cache
def _socket_counts() -> list[tuple[int, bytes]]:
    """Descriptors of the kernel's counts, kept: to open them costs ten times as much as to read."""
    counts = []
    for name, protocol in (("sockstat", b"TCP:"), ("sockstat6", b"TCP6:")):
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            fd = os.open(f"/proc/self/net/{name}", os.O_RDONLY | os.O_CLOEXEC)
            counts.append((fd, protocol))
    return counts
