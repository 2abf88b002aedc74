"""Every error that the sandbox raises on purpose."""

from __future__ import annotations


class SandboxError(Exception):
    """Base of all errors of this package."""


class SpecError(SandboxError):
    """A `SandboxSpec` (or what was given as one) is not one."""


class PlanError(SandboxError):
    """A layer was asked for that this machine does not give. Names the layer and the reason."""


class StepFailed(SandboxError):
    """A step of the plan failed while it was applied: the child is not run."""

    def __init__(self, step: str, reason: str) -> None:
        super().__init__(f"sandbox step {step!r} failed: {reason}")
        self.step = step
        self.reason = reason


class TargetError(SandboxError):
    """An import path leads nowhere, or to something that cannot be run."""


class ResultError(SandboxError):
    """What a child sent as its result is not a valid result message."""


class ZygoteFailed(SandboxError):
    """A zygote did not become ready: the agent's import failed, or took too long.

    `traceback` is the agent's own, or "". Both texts come from the agent: bounded and cleaned.
    """

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback
