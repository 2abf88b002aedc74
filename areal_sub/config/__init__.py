"""Configuration: `schema.py` (what there is), `load.py` (YAML + overrides → a `Config`)."""

from __future__ import annotations

from areal_sub.config.load import dump_config, load_config, parse_config
from areal_sub.config.schema import Config

__all__ = ["Config", "dump_config", "load_config", "parse_config"]
