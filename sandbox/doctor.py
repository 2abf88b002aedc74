"""What this machine gives, as a table for people: each layer, each tier, and what to do."""

from __future__ import annotations

import textwrap

from . import plan as plans
from .errors import PlanError
from .probe import Probe
from .spec import TIERS, SandboxSpec

_INDENT = 15


def describe(probed: Probe, columns: int = 100) -> str:
    """`columns`: how wide lines may be. What is missing is said once, at its layer."""
    versions = {"landlock": f"ABI {probed.landlock_abi}", "cgroups": f"v{probed.cgroup_version}"}
    lines = []
    for layer, reason in probed.layers.items():
        version = f" ({versions[layer]})" if layer in versions else ""
        lines += _wrapped(f"{layer:<{_INDENT}}", reason or f"available{version}", columns)
    lines.append("")
    for tier in TIERS:
        if tier == "auto":
            continue
        if missing := plans.missing(tier, probed):
            unprobed = [name for name in missing if name not in probed.layers]
            what = f"no: it takes {' and '.join(missing)}, see above"
            if unprobed:
                what = f"no: {' and '.join(unprobed)} was not probed"
            lines += _wrapped(f"tier {tier}: ", what, columns)
            continue
        lines.append(f"tier {tier}: yes")
        made = plans.plan(SandboxSpec(tier=tier), probed)
        for weakness in made.weaknesses:
            lines += _wrapped("  but ", weakness, columns)
    try:
        lines.append(f"auto takes: {plans.strongest(probed)}")
    except PlanError:
        lines.append("auto takes: nothing, since there is neither of its two tiers, see above")
    return "\n".join(lines)


def _wrapped(head: str, text: str, columns: int) -> list[str]:
    """Words are never cut: a command that is to be copied stays one."""
    return textwrap.wrap(
        text,
        max(columns, 2 * _INDENT),
        initial_indent=head,
        subsequent_indent=" " * min(len(head), _INDENT),
        break_long_words=False,
        break_on_hyphens=False,
    )
