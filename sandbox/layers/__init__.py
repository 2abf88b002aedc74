"""The layers of a sandbox: one module each, all of the same shape.

    NAME            what steps and errors call it
    probe()         "" where this machine gives the layer, else why not; called in a throwaway child
    apply(args, context)   do it, to the calling process; raises on any failure
    prepare(args)   optional: what many processes would compute alike, before they are forked

`args` is the step's JSON, made by `plan`; `context` is what differs from process to process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from . import (
    capabilities,
    cgroups,
    descriptors,
    environ,
    landlock,
    loopback,
    namespaces,
    no_new_privs,
    polled_limits,
    randomness,
    rlimits,
    root,
    scratch,
    seccomp,
    session,
)
from .context import Context

__all__ = ["APPLY", "PREPARE", "PROBE", "Context"]

_LAYERS = (
    session,
    descriptors,
    environ,
    randomness,
    rlimits,
    no_new_privs,
    landlock,
    seccomp,
    namespaces,
    root,
    scratch,
    loopback,
    polled_limits,
    cgroups,
    capabilities,
)

APPLY: Mapping[str, Callable[[Mapping[str, Any], Context], None]] = {
    layer.NAME: layer.apply for layer in _LAYERS
}
PROBE: Mapping[str, Callable[[], str]] = {layer.NAME: layer.probe for layer in _LAYERS}
PREPARE: Mapping[str, Callable[[Mapping[str, Any]], None]] = {seccomp.NAME: seccomp.prepare}
