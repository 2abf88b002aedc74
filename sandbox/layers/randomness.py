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
    # From sys.modules, not imported: what was never loaded has no state to reseed. (`random` does
    # it by itself, at each fork.)
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
