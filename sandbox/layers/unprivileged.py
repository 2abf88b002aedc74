"""Another user than root, with one capability kept: inside gVisor, where the relay stays root."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .. import kernel
from .context import Context

NAME = "unprivileged"


def probe() -> str:
    try:
        apply({"id": 1000, "keep": []}, Context())
    except OSError as error:
        return f"the user cannot be changed: {error}"
    return ""


def apply(args: Mapping[str, Any], context: Context) -> None:
    """`id`: of user and group; `keep`: capabilities, by number."""
    kernel.keep_capabilities_of_next_user()
    os.setgroups([])
    os.setresgid(args["id"], args["id"], args["id"])
    os.setresuid(args["id"], args["id"], args["id"])
    kernel.keep_capabilities(sum(1 << number for number in args["keep"]))
    kernel.set_dumpable(True)  # changing users hid /proc/self from its owner
