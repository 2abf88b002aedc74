"""Spec + probe → the ordered steps that a child applies. Pure; the result can be printed.

Order matters. The pipes are put in place before anything can fail loudly, limits come after the
files they would count, and what takes rights away comes last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import PlanError, StepFailed
from .layers import APPLY, Context
from .probe import Probe
from .spec import Limits, SandboxSpec


@dataclass(frozen=True)
class Step:
    layer: str
    args: Mapping[str, Any]
    """JSON; what `layers.<layer>.apply` takes."""

    def __str__(self) -> str:
        shown = ", ".join(
            # Names only: values of variables do not belong into logs.
            f"{key}=[{' '.join(sorted(value))}]" if isinstance(value, Mapping) else f"{key}={value}"
            for key, value in self.args.items()
        )
        return f"{self.layer:<14}{shown}".rstrip()


def plan(spec: SandboxSpec, probe: Probe) -> tuple[Step, ...]:
    """Raises `PlanError` naming every layer of the tier that this machine does not give."""
    steps = (
        Step("session", {"umask": 0o077}),
        Step("descriptors", {}),
        Step("environ", {"env": dict(spec.env)}),
        Step("randomness", {}),
        Step("rlimits", _rlimits(spec.limits)),
        Step("no_new_privs", {}),
    )
    missing = [
        f"{step.layer}: {reason}"
        for step in steps
        if (reason := probe.layers.get(step.layer, "it was not probed"))
    ]
    if missing:
        raise PlanError(f"the tier {spec.tier!r} is not to be had here: {'; '.join(missing)}")
    return steps


def _rlimits(limits: Limits) -> dict[str, list[int]]:
    return {
        # The soft limit's SIGXCPU can be ignored; the hard limit's SIGKILL cannot.
        "RLIMIT_CPU": [limits.cpu_s, limits.cpu_s + 1],
        "RLIMIT_AS": [limits.memory_bytes] * 2,
        "RLIMIT_NOFILE": [limits.open_files] * 2,
        "RLIMIT_FSIZE": [limits.file_bytes] * 2,
        "RLIMIT_CORE": [limits.core_bytes] * 2,
    }


def apply(steps: Sequence[Step], context: Context) -> None:
    """Apply the steps, in order, to this process. Raises `StepFailed` at the first failure."""
    for step in steps:
        try:
            APPLY[step.layer](step.args, context)
        except Exception as error:
            raise StepFailed(step.layer, f"{type(error).__name__}: {error}") from error


def to_json(steps: Sequence[Step]) -> list[list[Any]]:
    return [[step.layer, dict(step.args)] for step in steps]


def from_json(data: Sequence[Sequence[Any]]) -> tuple[Step, ...]:
    return tuple(Step(layer, args) for layer, args in data)
