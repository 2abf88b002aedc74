"""A fork whose child first does what is ours, and then what the agent's modules want after a fork.

Those may start threads (lancedb, OpenTelemetry): no process with threads can go into namespaces,
and what seals a process seals only the thread that asks for it. Hooks are called in the order in
which they were registered, so ours has to be there before the agent's code is.

Called by `zygote` and `init`.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

_first: list[Callable[[], None]] = []


def prepare() -> None:
    """Once in a zygote, before anything of the agent's."""
    os.register_at_fork(after_in_child=_do_first)


def fork(first: Callable[[], None]) -> int:
    """`os.fork()`; a child in which `first` raises ends."""
    _first.append(first)
    try:
        return os.fork()
    finally:
        _first.clear()


def _do_first() -> None:
    try:
        while _first:
            _first.pop()()
    except BaseException:  # which Python would only print
        traceback.print_exc()
        os._exit(1)
