"""What this machine gives, as a table for people: each layer, each tier, and what to do."""

from __future__ import annotations

from . import plan as plans
from .errors import PlanError
from .probe import Probe
from .spec import TIERS, SandboxSpec


def describe(probed: Probe) -> str:
    lines = [f"{layer:<15}{reason or 'available'}" for layer, reason in probed.layers.items()]
    if not probed.layers.get("landlock", "?"):
        at = next(i for i, line in enumerate(lines) if line.startswith("landlock"))
        lines[at] += f" (ABI {probed.landlock_abi})"
    if not probed.layers.get("cgroups", "?"):
        at = next(i for i, line in enumerate(lines) if line.startswith("cgroups"))
        lines[at] += f" (v{probed.cgroup_version})"
    lines.append("")
    for tier in TIERS:
        if tier == "auto":
            continue
        try:
            made = plans.plan(SandboxSpec(tier=tier), probed)
        except PlanError as error:
            lines.append(f"tier {tier}: no. {error}")
            continue
        lines.append(f"tier {tier}: yes")
        lines += [f"  but {weakness}" for weakness in made.weaknesses]
    try:
        lines.append(f"auto takes: {plans.strongest(probed)}")
    except PlanError as error:
        lines.append(f"auto takes: nothing. {error}")
    return "\n".join(lines)
