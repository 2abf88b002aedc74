"""Own session, so own process group and no terminal; default signals; own working directory."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from typing import Any

from .. import reaper
from .context import Context

NAME = "session"
_SIG_DFL = 0


def probe() -> str:
    try:
        reaper.children_of(os.getpid())
    except OSError as error:  # a kernel without CONFIG_PROC_CHILDREN, or no /proc
        return f"the processes of a session cannot be found again: {error}"
    return ""


def apply(args: Mapping[str, Any], context: Context) -> None:
    os.setsid()
    # The forking processes note their children's ends through these two.
    signal.set_wakeup_fd(-1)
    reaper.set_handler(signal.SIGCHLD, _SIG_DFL)
    reaper.set_handler(signal.SIGINT, signal.default_int_handler)  # ignored by those around it
    os.umask(args["umask"])
    os.chdir(os.path.join(context.folder, "work"))
