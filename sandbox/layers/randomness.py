"""Fresh random states: children of one zygote would otherwise all draw the same numbers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from .context import Context

NAME = "randomness"


def probe() -> str:
    return ""


def apply(args: Mapping[str, Any], context: Context) -> None:
    # From sys.modules, not imported: what was never loaded has no state to reseed.
    for name in ("random", "numpy.random"):
        module = sys.modules.get(name)
        if module is not None:
            module.seed()
