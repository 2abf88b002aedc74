"""Which server a request goes to. Pure.

Requests of one rollout go to one server, which has their prefix in its cache; new rollouts go where
the fewest requests run.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

MAX_REMEMBERED = 16_384


class Routes:
    def __init__(self) -> None:
        self._server_of: OrderedDict[str, int] = OrderedDict()  # affinity → server, oldest first

    def choose(self, affinity: str, loads: Mapping[int, int]) -> int:
        """A key of `loads` (ready servers → requests that run there), which is not empty."""
        server = self._server_of.get(affinity) if affinity else None
        if server is None or server not in loads:
            server = min(loads, key=lambda each: (loads[each], each))
        if affinity:
            self._server_of[affinity] = server
            self._server_of.move_to_end(affinity)
            if len(self._server_of) > MAX_REMEMBERED:
                self._server_of.popitem(last=False)
        return server
