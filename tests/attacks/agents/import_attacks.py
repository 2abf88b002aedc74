"""Attacks at import: this module's code runs in the zygote, before any child is sealed.

What to aim at comes from a file beside it. `act` tells a child what came of them.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
from typing import Any

import attacks
import on_resources

with open(os.path.join(os.path.dirname(__file__), "aims.json")) as _file:
    AIMS = json.load(_file)

AT_IMPORT = {
    name: attacks.act({**AIMS, "attack": name, "at_import": True})
    for name in ("a01", "a02", "a04", "a05", "a17", "a18", "a22", "a23", "a28", "a44a", "a46a")
}
TAKEN_AT_IMPORT = attacks.act({"attack": "a69c"})

# For the children to come: memory that they share, and a tool box without its sharp tools.
on_resources.SHARED.append(mmap.mmap(-1, 4096))
if AIMS["tear_out"]:
    sys.modules["_sandbox.layers"].APPLY["rlimits"] = lambda args, context: None


def act(data: dict[str, Any]) -> Any:
    told = {"a69a": AT_IMPORT, "a69c": TAKEN_AT_IMPORT}
    return told[data["attack"]] if data["attack"] in told else attacks.act(data)
