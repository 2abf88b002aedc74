"""Resource limits, hard and soft. Each process of a child has them for itself."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from typing import Any

from .context import Context

NAME = "rlimits"


def probe() -> str:
    return ""


def apply(args: Mapping[str, Any], context: Context) -> None:
    for name, (soft, hard) in args.items():
        which = getattr(resource, name)
        _, ceiling = resource.getrlimit(which)
        if which == resource.RLIMIT_NOFILE:
            # Who passes descriptors may have as many in flight as it may have open, all of this
            # user's counted: we need more than a child can have there.
            ceiling = ceiling if ceiling == resource.RLIM_INFINITY else ceiling // 2
        if ceiling != resource.RLIM_INFINITY:  # never ask for more than we were given
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(which, (soft, hard))
