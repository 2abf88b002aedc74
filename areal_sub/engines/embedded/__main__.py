"""`python -m areal_sub.engines.embedded SETTINGS.json`: how the trainer starts this engine."""

from __future__ import annotations

from areal_sub.component import run_component
from areal_sub.engines.embedded.server import serve

if __name__ == "__main__":
    run_component("engine", serve)
