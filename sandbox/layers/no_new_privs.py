"""No `execve` in the child grants privileges: setuid programs and file capabilities do nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import kernel
from .context import Context

NAME = "no_new_privs"


def probe() -> str:
    try:
        kernel.set_no_new_privs()
    except OSError as error:
        return f"the kernel refuses prctl(PR_SET_NO_NEW_PRIVS): {error}"
    return ""


def apply(args: Mapping[str, Any], context: Context) -> None:
    kernel.set_no_new_privs()
    if not kernel.has_no_new_privs():
        raise OSError("the kernel did not set no_new_privs")
