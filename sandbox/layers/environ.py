"""The scrubbed environment: nothing but the base variables and the private folders.

The run's own variables come later, with the request, in a child that is sealed by then.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import SpecError
from ..spec import LOADER_PREFIXES
from .context import Context

NAME = "environ"

# What a program needs to find others and to speak the user's language. None of it is a secret.
ALLOWED = ("PATH", "LANG", "LANGUAGE", "TZ")
ALLOWED_PREFIX = "LC_"


def allowed(environ: Mapping[str, str], passthrough: Iterable[str] = ()) -> dict[str, str]:
    """The part of `environ` that children may see: the allowlist and the names in `passthrough`.

    Raises `SpecError` for a name that steers a loader (`LD_*`, `PYTHON*`).
    """
    names = set(passthrough)
    for name in names:
        if name.startswith(LOADER_PREFIXES):
            raise SpecError(f"the variable {name!r} steers a loader: it cannot be passed through")
    return {
        name: value
        for name, value in environ.items()
        if name in ALLOWED or name.startswith(ALLOWED_PREFIX) or name in names
    }


def probe() -> str:
    return ""


def apply(args: Mapping[str, Any], context: Context) -> None:
    wanted = {
        **args["env"],
        "HOME": f"{context.folder}/home",
        "TMPDIR": f"{context.folder}/tmp",
    }
    if os.environ != wanted:  # else as the zygote was started, and its agent has left it
        os.environ.clear()
        os.environ.update(wanted)
    # What an import in the zygote may have cached from there.
    tempfile: Any = sys.modules.get("tempfile")
    if tempfile is not None:
        tempfile.tempdir = None
