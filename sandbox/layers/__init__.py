"""The layers of a sandbox: one module each, all of the same shape.

    NAME            what steps and errors call it
    probe()         "" where this machine gives the layer, else why not; called in a throwaway child
    apply(args, context)   do it, to the calling process; raises on any failure

`args` is the step's JSON, made by `plan`; `context` is what differs from process to process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from . import (
    bwrap,
    capabilities,
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

__all__ = ["APPLY", "OUTER", "PROBE", "Context", "checks"]

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
    capabilities,
)

_OUTER = (bwrap,)

APPLY: Mapping[str, Callable[[Mapping[str, Any], Context], None]] = {
    layer.NAME: layer.apply for layer in (*_LAYERS, *_OUTER)
}
PROBE: Mapping[str, Callable[[], str]] = {layer.NAME: layer.probe for layer in _LAYERS}
OUTER: Mapping[str, Callable[[], str]] = {layer.NAME: layer.probe for layer in _OUTER}
"""Of the outer tiers, each called like its tier. They start programs of others: not in no time."""


def checks(tier: str) -> Mapping[str, Callable[[], str]]:
    """What to probe for a tier."""
    return {**PROBE, tier: OUTER[tier]} if tier in OUTER else PROBE
