"""Configuration: `schema.py` (what there is), `load.py` (YAML + overrides → a `Config`)."""

from __future__ import annotations

from areal_sub.config.load import load_config, parse_config
from areal_sub.config.schema import Config

__all__ = ["Config", "load_config", "parse_config"]
