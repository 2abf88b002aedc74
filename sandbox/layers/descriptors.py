"""stdin empty, stdout and stderr piped, the result pipe as descriptor 3, everything else shut."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..kernel import close_all_descriptors_but
from .context import RESULT_FD, Context

NAME = "descriptors"


def probe() -> str:
    try:
        os.listdir("/proc/self/fd")
    except OSError as error:
        return f"cannot list open descriptors: {error}"
    return ""


def apply(args: Mapping[str, Any], context: Context) -> None:
    keep = [context.request, *context.keep]
    if min(context.stdout, context.stderr, context.result, *keep) <= RESULT_FD:
        raise ValueError("the pipes of a child must not lie on descriptors 0 to 3")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(context.stdout, 1)
    os.dup2(context.stderr, 2)
    os.dup2(context.result, RESULT_FD, inheritable=False)
    close_all_descriptors_but({0, 1, 2, RESULT_FD, *keep})
