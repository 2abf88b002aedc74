"""Turn `pip install --report` (JSON on stdin) into constraints.txt on stdout.

Called by `make constraints`. Pins everything that the extras pull in, except what torch's GPU
builds bring along: torch itself pins those, and which there are depends on the machine.
"""

from __future__ import annotations

import json
import sys

HEADER = """\
# The versions that areal-sub is tested with: all that its extras pull in, transitively.
# `make train` and `make test` install with these. Refresh with `make constraints`.
"""
OF_TORCH = ("nvidia-", "cuda-", "triton", "pytorch-triton")


def main() -> None:
    report = json.load(sys.stdin)
    pins: dict[str, str] = {}
    for item in report["install"]:
        name = item["metadata"]["name"].lower().replace("_", "-").replace(".", "-")
        version = item["metadata"]["version"].partition("+")[0]  # torch 2.13.0+cpu is torch 2.13.0
        if name != "areal-sub" and not name.startswith(OF_TORCH):
            pins[name] = version
    sys.stdout.write(HEADER)
    for name, version in sorted(pins.items()):
        sys.stdout.write(f"{name}=={version}\n")


if __name__ == "__main__":
    main()
