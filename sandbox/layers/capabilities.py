"""Capabilities of the child's user namespace: given up, but for those that are named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import kernel
from .context import Context

NAME = "capabilities"


def probe() -> str:
    try:
        kernel.keep_capabilities(0)
    except OSError as error:
        return f"capabilities cannot be given up: {error}"
    return ""


def apply(args: Mapping[str, Any], context: Context) -> None:
    """`keep`: numbers of linux/capability.h."""
    kernel.keep_capabilities(sum(1 << number for number in args["keep"]))
