"""The command line by which an interpreter loads this package and nothing else of its caller's.

From its folder, under a private name: no import path is shared with it, and an agent's own module
called like this package does not collide. Used by `launch`, and by `child` where each child is a
fresh interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

_BOOT = """\
import importlib, importlib.util, os, sys
def load(folder, name):
    spec = importlib.util.spec_from_file_location(
        "_sandbox", os.path.join(folder, "__init__.py"), submodule_search_locations=[folder])
    sys.modules["_sandbox"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return importlib.import_module(f"_sandbox.{name}").main
main, fds = load(*sys.argv[2:4]), [int(fd) for fd in sys.argv[4:]]
sys.argv[1:] = []
del load, importlib, os, sys
main(*fds)
"""


def boot_command(
    python: str, label: str, module: str, fds: Iterable[int], *, site: bool
) -> list[str]:
    """Runs `module.main(*fds)` in `python`, isolated; `label` only shows in lists of processes."""
    package = os.path.dirname(os.path.abspath(__file__))
    flags = ["-I", "-X", "utf8"] if site else ["-I", "-S", "-X", "utf8"]
    words = [python, *flags, "-c", _BOOT, f"sandbox:{label}", package, module]
    return words + [str(fd) for fd in fds]
