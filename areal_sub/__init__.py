"""areal-sub: train the model behind any agent, including an agent you don't trust.

The public face: `Trainer`, `AgentWorkflow`, `load_config`. Importing the package loads none of the
heavy parts: agents import it in their own process, where torch has no business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from areal_sub.config import load_config
    from areal_sub.trainer import Trainer
    from areal_sub.workflow import AgentWorkflow

__version__ = "0.1.0"
__all__ = ["AgentWorkflow", "Trainer", "__version__", "load_config"]

_HOMES = {
    "Trainer": "areal_sub.trainer",
    "AgentWorkflow": "areal_sub.workflow",
    "load_config": "areal_sub.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'areal_sub' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
