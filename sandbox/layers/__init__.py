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
    bwrap,
    capabilities,
    cgroups,
    descriptors,
    environ,
    gvisor,
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
    some_namespaces,
    unprivileged,
)
from .context import Context

__all__ = ["APPLY", "INSIDE_GVISOR", "OUTER", "PREPARE", "PROBE", "Context", "checks"]

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

_OUTER = (bwrap, gvisor)
_INSIDE_GVISOR = (
    session,
    descriptors,
    environ,
    randomness,
    rlimits,
    no_new_privs,
    seccomp,
    capabilities,
    unprivileged,
    some_namespaces,
)

APPLY: Mapping[str, Callable[[Mapping[str, Any], Context], None]] = {
    layer.NAME: layer.apply for layer in (*_LAYERS, *_INSIDE_GVISOR, *_OUTER)
}
PROBE: Mapping[str, Callable[[], str]] = {layer.NAME: layer.probe for layer in _LAYERS}
PREPARE: Mapping[str, Callable[[Mapping[str, Any]], None]] = {seccomp.NAME: seccomp.prepare}
OUTER: Mapping[str, Callable[[], str]] = {layer.NAME: layer.probe for layer in _OUTER}
"""Of the outer tiers, each called like its tier. They start programs of others: not in no time."""

INSIDE_GVISOR: Mapping[str, Callable[[], str]] = {
    layer.NAME: layer.probe for layer in _INSIDE_GVISOR
}
"""What the tier `gvisor` needs of gVisor's kernel; `gvisor.probe` tries them in there."""


def checks(tier: str) -> Mapping[str, Callable[[], str]]:
    """What to probe for a tier."""
    return {**PROBE, tier: OUTER[tier]} if tier in OUTER else PROBE
