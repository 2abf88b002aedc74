"""Where the running interpreter and its environment lie: what an agent needs to read to import."""

from __future__ import annotations

import functools
import os
import sys


@functools.cache
def interpreter_paths() -> tuple[str, ...]:
    """Folders and files of the import path, the prefixes and this package.

    As they are at the first call, so before any agent's module is imported.
    """
    own = os.path.dirname(os.path.abspath(__file__))
    candidates = [sys.prefix, sys.base_prefix, sys.executable, *sys.path, own]
    return tuple(p for p in dict.fromkeys(candidates) if os.path.isabs(p) and p != "/")
