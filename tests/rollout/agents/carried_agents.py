"""Agents that use what of this package is carried into their own interpreter."""

from __future__ import annotations

import sys
from typing import Any

from areal_sub import AgentWorkflow


class Subclass(AgentWorkflow):
    async def run(self, data: dict[str, Any], **extra_kwargs: Any) -> float:
        return float(data["reward"])


def tells(data: dict[str, Any]) -> Any:
    """Nothing that is installed for the trainer is there; what is carried is."""
    import areal_sub

    leaked = [path for path in sys.path if path.startswith(data["ours"])]
    for name in ("areal_sub.trainer", "areal_sub.config", "msgpack"):
        try:
            __import__(name)
        except ImportError:
            continue
        leaked.append(name)
    folder = areal_sub.__file__.split("/")[-3]
    return {"num_leaked": len(leaked), "minor": sys.version_info[1], folder: 1.0}
