"""`python -m areal_sub.proxy SETTINGS.json`: started by the trainer, see `server.py`."""

from __future__ import annotations

from areal_sub.component import run_component
from areal_sub.proxy.server import main

if __name__ == "__main__":
    run_component("proxy", main)
