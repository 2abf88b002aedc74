"""Hostile on import: from here on no child of this zygote enters its group."""

from __future__ import annotations

import sys

from greedy import agent

sys.modules["_sandbox.layers"].APPLY["cgroups"] = lambda args, context: None

__all__ = ["agent"]
