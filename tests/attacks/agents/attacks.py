"""The hostile agent: `act` runs the attack that it is told to. Standard library only.

One function per line of the catalogue. It says how its attempt ended: "stopped: ..." or
"SUCCEEDED: ...", or "left" where that shows only from outside.
"""

from __future__ import annotations

from typing import Any

import on_egress
import on_files
import on_kernel
import on_processes
import on_proxy
import on_resources

_MODULES = (on_files, on_processes, on_kernel, on_egress, on_resources, on_proxy)


def act(data: dict[str, Any]) -> Any:
    if data["attack"] == "undisturbed_alone":
        return "well"
    for module in _MODULES:
        attack = getattr(module, data["attack"], None)
        if attack is not None:
            return attack(data)
    raise LookupError(f"there is no attack {data['attack']!r}")
