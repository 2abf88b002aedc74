"""Where the running interpreter and its environment lie: what an agent needs to read to import."""

from __future__ import annotations

import os
import sys


def interpreter_paths() -> list[str]:
    """Existing folders and files of the import path, the prefixes and this package."""
    own = os.path.dirname(os.path.abspath(__file__))
    candidates = [sys.prefix, sys.base_prefix, sys.executable, *sys.path, own]
    return [path for path in dict.fromkeys(candidates) if os.path.isabs(path) and path != "/"]
