"""The layers of a sandbox: one module each, all of the same shape.

    NAME            what steps and errors call it
    probe()         "" where this machine gives the layer, else why not; called in a throwaway child
    apply(args, context)   do it, in the child, to the calling process; raises on any failure

`args` is the step's JSON, made by `plan`; `context` is what differs from run to run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from . import descriptors, environ, no_new_privs, randomness, rlimits, session
from .context import Context

__all__ = ["APPLY", "PROBE", "Context"]

_LAYERS = (session, descriptors, environ, randomness, rlimits, no_new_privs)

APPLY: Mapping[str, Callable[[Mapping[str, Any], Context], None]] = {
    layer.NAME: layer.apply for layer in _LAYERS
}
PROBE: Mapping[str, Callable[[], str]] = {layer.NAME: layer.probe for layer in _LAYERS}
