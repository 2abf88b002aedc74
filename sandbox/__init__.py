"""Run untrusted code, each time in a fresh sealed child, in milliseconds. Standard library only.

The way of a child: a `SandboxSpec` says what it may do (`spec`), `probe` what this kernel permits,
`plan` turns both into an ordered list of steps that can be printed and refused, and the child
applies them, failing closed. A `Zygote` (`handle`) is one agent's code, imported and warmed up
once; `await zygote.run(...)` forks a child of it and returns a `ChildReport` when every process of
that child is gone.

This package knows nothing of who uses it, and imports nothing but the standard library and itself
(relatively): `launch` loads it by its folder into whatever interpreter runs the agent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .box import BlockingSandbox, Sandbox
    from .errors import PlanError, SandboxError, SpecError, ZygoteFailed
    from .handle import Zygote
    from .renewal import RenewedZygote
    from .report import ChildReport, Ending
    from .spec import Limits, SandboxSpec

__all__ = [
    "BlockingSandbox",
    "ChildReport",
    "Ending",
    "Limits",
    "PlanError",
    "RenewedZygote",
    "Sandbox",
    "SandboxError",
    "SandboxSpec",
    "SpecError",
    "Zygote",
    "ZygoteFailed",
]

# Loaded on first use: a zygote needs the child's half of the package, never asyncio and `handle`.
_HOMES = {
    "BlockingSandbox": "box",
    "Sandbox": "box",
    "ChildReport": "report",
    "Ending": "report",
    "Limits": "spec",
    "PlanError": "errors",
    "RenewedZygote": "renewal",
    "SandboxError": "errors",
    "SandboxSpec": "spec",
    "SpecError": "errors",
    "Zygote": "handle",
    "ZygoteFailed": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
