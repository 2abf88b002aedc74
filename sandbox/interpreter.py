"""Where the running interpreter and its environment lie: what an agent needs to read to import.

Interpreters are started without `site`, for that runs what the environment's packages want run
(`.pth` files, `sitecustomize`): their code, so it belongs into the enclosed zygote.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator


@functools.cache
def interpreter_paths() -> tuple[str, ...]:
    """Folders and files of the import path, the prefixes and this package.

    As they are at the first call, so before any agent's module is imported.
    """
    own = os.path.dirname(os.path.abspath(__file__))
    candidates = [*_prefixes(), sys.executable, *sys.path, *_named_in_pth_files(), own]
    return tuple(p for p in dict.fromkeys(candidates) if os.path.isabs(p) and p != "/")


def enter_environment() -> None:
    """Do what a start with `site` would have done: the virtual environment, its packages."""
    import site

    site.main()


def _prefixes() -> list[str]:
    found = [sys.prefix, sys.base_prefix]
    folder = os.path.dirname(sys.executable)
    for venv in (folder, os.path.dirname(folder)):
        if os.path.isfile(os.path.join(venv, "pyvenv.cfg")):
            found.insert(0, venv)
    return list(dict.fromkeys(found))


def _named_in_pth_files() -> Iterator[str]:
    """Folders that packages were installed from in place ("editable"); nothing is run here."""
    import site

    for folder in site.getsitepackages(_prefixes()):
        try:
            names = sorted(name for name in os.listdir(folder) if name.endswith(".pth"))
        except OSError:
            continue
        for name in names:
            try:
                with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:
                    lines = file.read().splitlines()
            except OSError:
                continue
            for line in map(str.strip, lines):
                path = os.path.normpath(os.path.join(folder, line))
                if line and not line.startswith(("#", "import ", "import\t")):
                    yield path
