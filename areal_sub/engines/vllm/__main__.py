"""`python -m areal_sub.engines.vllm SETTINGS.json`: how the trainer starts this engine."""

from __future__ import annotations

from areal_sub.component import run_component
from areal_sub.engines.vllm.server import serve

if __name__ == "__main__":
    run_component("engine", serve)
