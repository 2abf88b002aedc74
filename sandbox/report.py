"""How a child ended: the report, and the pure decision that makes one of what was seen.

All texts and the value come from the child: hostile, but bounded and cleaned (`wire`).
"""

from __future__ import annotations

import enum
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .cgroups import Usage
from .errors import ResultError
from .layers.polled_limits import MAX_TCP_SOCKETS
from .spec import Limits
from .wire import Status, decode_result


class Ending(enum.Enum):
    """Why a child ended. Exactly one per child."""

    RETURNED = "returned"  # `value` holds what the agent returned
    RAISED = "raised"
    EXITED = "exited"  # the process ended by itself without a result
    SIGNALED = "signaled"  # it died of a signal that was not ours
    TIMEOUT = "timeout"
    OUTPUT_LIMIT = "output_limit"
    RESULT_LIMIT = "result_limit"
    MEMORY_LIMIT = "memory_limit"  # of all its processes together
    CPU_LIMIT = "cpu_limit"  # of all its processes together
    BAD_RESULT = "bad_result"  # the result message is not a valid one
    SETUP_FAILED = "setup_failed"  # a step of the plan failed: nothing was run
    STOPPED = "stopped"  # ordered by the caller
    LOST = "lost"  # the zygote died under it


@dataclass(frozen=True)
class ChildReport:
    ending: Ending
    value: Any = None
    """What the agent returned, in JSON types; None unless RETURNED."""
    error: str = ""
    """One line: what happened; "" where RETURNED."""
    traceback: str = ""
    """The agent's, where RAISED."""
    stdout_tail: str = ""
    stderr_tail: str = ""
    exit_code: int | None = None
    signal: int | None = None
    wall_s: float = 0.0
    cpu_s: float = 0.0
    """Of all its processes."""
    max_rss_bytes: int = 0
    """Of its largest process."""
    num_killed: int = 0
    """Processes that it left behind."""
    egress_refused: Mapping[str, int] = field(default_factory=dict)
    """ "host:port" that its allowlist refused → how often; beyond a few dozen of them "others"."""
    peak_memory_bytes: int = 0
    """Of all its processes together at one time, by its cgroup: files in memory and what the kernel
    held for them included. 0 where it had none."""
    measured_by: str = "processes"
    """ "cgroup": `cpu_s` is the kernel's account of all its processes, and `peak_memory_bytes` is
    there; "processes": added up from those that were waited for."""
    written_bytes: int = 0
    """What its files took at its end, those of its workspace among them."""
    outputs: Mapping[str, bytes] = field(default_factory=dict)
    """The content of each declared output, by its path in the working directory."""
    outputs_refused: tuple[tuple[str, str], ...] = ()
    """(path, why) of what was declared, or lay in a declared folder, and was not taken."""
    outputs_missing: tuple[str, ...] = ()
    """Declared, and not there."""


def conclude(
    *,
    stopped: Ending | None,
    status: Status | None,
    result: bytes,
    limits: Limits,
    wall_s: float,
    used: Usage | None = None,
) -> tuple[Ending, Any, str, str]:
    """(ending, value, error, traceback) of a child that is gone.

    `stopped`: why we ended it, if we did; it wins over what the dying child still said. `used`: by
    its group, where it had one; of limits of all processes together that wins over what the child
    made of it (one that lives on after the kernel has killed another one, say).
    """
    if stopped is not None:
        return stopped, None, _stop_error(stopped, limits, wall_s), ""
    if status is None:
        return Ending.LOST, None, "the zygote died under the child", ""
    if status.failed_step:
        error = f"sandbox step {status.failed_step!r} failed: {status.error}"
        if status.failed_step == "workspace":
            error += _limit_of_files(status.error, limits)
        return Ending.SETUP_FAILED, None, error, ""
    if status.limit == "sockets":
        error = f"its processes had more than {MAX_TCP_SOCKETS} TCP sockets together"
        return Ending.MEMORY_LIMIT, None, error, ""
    over = {"memory": Ending.MEMORY_LIMIT, "cpu": Ending.CPU_LIMIT}.get(status.limit)
    over = over or (exceeded(used, limits) if used is not None else None)
    if over is not None:
        return over, None, _stop_error(over, limits, wall_s), ""
    if status.signal is not None:
        error = f"killed by {_signal_name(status.signal)}"
        if status.signal == signal.SIGXCPU:
            error += f": a process used more than {limits.cpu_s} s of CPU"
        return Ending.SIGNALED, None, f"{error}; {status.error}" if status.error else error, ""
    if not result:
        return Ending.EXITED, None, f"exited with code {status.exit_code} without a result", ""
    try:
        message = decode_result(result)
    except ResultError as failure:
        return Ending.BAD_RESULT, None, str(failure), ""
    if message.error is not None:
        return Ending.RAISED, None, message.error, message.traceback
    if status.exit_code != 0:
        return Ending.EXITED, None, f"exited with code {status.exit_code} after its result", ""
    return Ending.RETURNED, message.value, "", ""


def exceeded(used: Usage, limits: Limits) -> Ending | None:
    """Which limit of all processes together a child is over, by its group."""
    if used.num_oom_kills:
        return Ending.MEMORY_LIMIT
    return Ending.CPU_LIMIT if used.cpu_s > limits.total_cpu_s else None


def _limit_of_files(error: str, limits: Limits) -> str:
    """Which limit an error while files are written speaks of; "" where it is none."""
    if error.startswith("ENOSPC"):
        return (
            f"; the child's files may have {limits.scratch_bytes} bytes together "
            f"(limits.scratch_bytes) and be {limits.scratch_files} (limits.scratch_files)"
        )
    if error.startswith("EFBIG"):
        return f"; a file may have {limits.file_bytes} bytes (limits.file_bytes)"
    return ""


def _stop_error(stopped: Ending, limits: Limits, wall_s: float) -> str:
    together = "its processes used more than {} together"
    return {
        Ending.MEMORY_LIMIT: together.format(f"{limits.total_memory_bytes} bytes of memory"),
        Ending.CPU_LIMIT: together.format(f"{limits.total_cpu_s} s of CPU"),
        Ending.TIMEOUT: f"did not end within {wall_s:g} s",
        Ending.OUTPUT_LIMIT: f"wrote more than {limits.output_bytes} bytes to stdout and stderr",
        Ending.RESULT_LIMIT: f"its result is larger than {limits.result_bytes} bytes",
        Ending.STOPPED: "it was ordered to stop",
        Ending.LOST: "its zygote was closed or died under it",
    }[stopped]


def _signal_name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"
