"""Spec + probe → the ordered steps of each stage. Pure; the result can be printed and compared.

    outer    around all of it, by a program of others; only in the tiers that are called so
    root     once per zygote, before any process of it runs agent code
    zygote   what encloses the zygote before it imports the agent; its children inherit it
    cell     around one child, by its init, which runs no agent code
    child    in the process that becomes the agent

Order matters. The pipes are put in place before anything can fail loudly, limits come after the
files they would count, and what takes rights away comes last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import kernel
from .errors import PlanError, StepFailed
from .layers import APPLY, Context
from .layers import landlock as landlock_layer
from .layers import root as root_layer
from .layers.scratch import ROOM
from .probe import Probe
from .spec import Limits, SandboxSpec

STAGES = ("outer", "root", "zygote", "cell", "child")


@dataclass(frozen=True)
class Step:
    layer: str
    args: Mapping[str, Any]
    """JSON; what `layers.<layer>.apply` takes."""

    def __str__(self) -> str:
        shown = ", ".join(
            # Names only: values of variables do not belong into logs.
            f"{key}=[{' '.join(sorted(value))}]" if isinstance(value, Mapping) else f"{key}={value}"
            for key, value in self.args.items()
        )
        return f"{self.layer:<14}{shown}".rstrip()


@dataclass(frozen=True)
class Plan:
    tier: str
    root: tuple[Step, ...]
    zygote: tuple[Step, ...]
    cell: tuple[Step, ...]
    child: tuple[Step, ...]
    weaknesses: tuple[str, ...] = ()
    """What this tier does not do on this machine, each as a sentence."""
    outer: tuple[Step, ...] = ()

    def __str__(self) -> str:
        lines = [f"tier {self.tier}"]
        for stage in STAGES:
            lines += [f"{stage:<8}{step}" for step in getattr(self, stage)]
        return "\n".join(lines + [f"note    {weakness}" for weakness in self.weaknesses])


def plan(spec: SandboxSpec, probe: Probe) -> Plan:
    """Raises `PlanError` naming every layer of the tier that this machine does not give."""
    tier = strongest(probe) if spec.tier == "auto" else spec.tier
    made = _MAKE[tier](spec, probe)
    missing = [f"{layer}: {reason}" for layer, reason in _missing(made, probe).items()]
    if missing:
        raise PlanError(f"the tier {tier!r} is not to be had here: {'; '.join(missing)}")
    return made


def strongest(probe: Probe) -> str:
    """The strongest tier that this machine gives. Raises `PlanError` where it gives none."""
    reasons = []
    for tier, make in (("namespaces", _namespaces), ("process", _process)):
        missing = _missing(make(SandboxSpec(tier=tier), probe), probe)
        if not missing:
            return tier
        reasons += [f"{tier}: {layer}: {reason}" for layer, reason in missing.items()]
    raise PlanError(f"this machine gives no tier; {'; '.join(reasons)}")


def _namespaces(spec: SandboxSpec, probe: Probe) -> Plan:
    limits = spec.limits
    rlimits = {**_rlimits(limits), "RLIMIT_NPROC": [limits.processes] * 2}
    landlock = {
        "readable": ["/"],
        "hidden": [],
        "writable": [ROOM, *root_layer.DEVICES],
        "own_folder": False,
        "ports": None,
    }
    scratch = {"size_bytes": limits.scratch_bytes, "files": limits.scratch_files}
    return Plan(
        tier="namespaces",
        root=(
            Step("namespaces", {}),
            Step("root", {"readable": list(spec.readable), "hidden": list(spec.hidden)}),
            Step("scratch", {**scratch, "proc": False}),
            Step("loopback", {"port": None}),
        ),
        zygote=(
            # To put a new child into the pid namespace of its cell; nothing else is left to do
            # with it, see seccomp.
            Step("capabilities", {"keep": [kernel.CAP_SYS_ADMIN]}),
            Step("no_new_privs", {}),
            Step("landlock", landlock),
            Step("seccomp", {"permit": ["setns"], "only_tcp": False}),
            Step("rlimits", _zygote_rlimits(limits)),
        ),
        cell=(
            Step("namespaces", {}),
            Step("scratch", {**scratch, "proc": True}),
            Step("loopback", {"port": spec.port}),
            Step(
                "polled_limits",
                {"memory_bytes": limits.total_memory_bytes, "cpu_s": limits.total_cpu_s},
            ),
        ),
        child=(
            Step("session", {"umask": 0o077}),
            Step("descriptors", {}),
            Step("environ", {"env": dict(spec.env)}),
            Step("randomness", {}),
            Step("rlimits", rlimits),
            Step("capabilities", {"keep": []}),
            Step("no_new_privs", {}),
            Step("seccomp", {"deny": ["setns"]}),
        ),
    )


def _bwrap(spec: SandboxSpec, probe: Probe) -> Plan:
    paths = {"readable": list(spec.readable), "hidden": list(spec.hidden)}
    inner = _namespaces(spec, probe)
    return dataclasses.replace(inner, tier="bwrap", outer=(Step("bwrap", paths),))


def _process(spec: SandboxSpec, probe: Probe) -> Plan:
    readable = [
        *root_layer.SYSTEM_PATHS,
        *root_layer.ETC_PATHS,
        "/etc/hosts",
        "/proc",
        *spec.readable,
    ]
    common = {"readable": readable, "hidden": list(spec.hidden), "ports": _ports(spec)}
    return Plan(
        tier="process",
        root=(),
        zygote=(
            # Root's: with CAP_PERFMON alone every process's environment can be read.
            Step("capabilities", {"keep": []}),
            Step("no_new_privs", {}),
            Step("landlock", {**common, "writable": list(root_layer.DEVICES), "own_folder": True}),
            Step("seccomp", {"permit": [], "only_tcp": True}),
            Step("rlimits", _zygote_rlimits(spec.limits)),
        ),
        cell=(),
        child=(
            Step("session", {"umask": 0o077}),
            Step("descriptors", {}),
            Step("environ", {"env": dict(spec.env)}),
            Step("randomness", {}),
            Step("rlimits", _rlimits(spec.limits)),
            Step("no_new_privs", {}),
            Step("landlock", {**common, "writable": list(root_layer.DEVICES), "own_folder": True}),
        ),
        weaknesses=_process_weaknesses(probe),
    )


def _gvisor(spec: SandboxSpec, probe: Probe) -> Plan:
    paths = {"readable": list(spec.readable), "hidden": list(spec.hidden)}
    return Plan(
        tier="gvisor",
        outer=(Step("gvisor", {**paths, "scratch_bytes": spec.limits.scratch_bytes}),),
        root=(),
        zygote=(
            # For each child's own network; seccomp leaves nothing else to do with them.
            Step(
                "unprivileged",
                {
                    "id": root_layer.INSIDE_ID,
                    "keep": [kernel.CAP_SYS_ADMIN, kernel.CAP_NET_ADMIN],
                },
            ),
            Step("no_new_privs", {}),
            Step("seccomp", {"permit": ["unshare"], "only_tcp": False}),
            Step("rlimits", _zygote_rlimits(spec.limits)),
        ),
        cell=(Step("some_namespaces", {}), Step("loopback", {"port": spec.port})),
        child=(
            Step("session", {"umask": 0o077}),
            Step("descriptors", {}),
            Step("environ", {"env": dict(spec.env)}),
            Step("randomness", {}),
            Step("rlimits", _rlimits(spec.limits)),
            Step("capabilities", {"keep": []}),
            Step("no_new_privs", {}),
            Step("seccomp", {"deny": ["unshare"]}),
        ),
        weaknesses=(
            "children of one agent that run at a time can reach each other's files, and read with "
            "which environment a program was executed: gVisor has neither Landlock nor mount "
            "namespaces",
            "the number of processes of a child is not limited, nor what they use together",
        ),
    )


_MAKE = {"namespaces": _namespaces, "process": _process, "bwrap": _bwrap, "gvisor": _gvisor}


def _process_weaknesses(probe: Probe) -> tuple[str, ...]:
    notes = [
        "other processes and the paths of files can be listed, though not read",
        "the number of processes of a child is not limited, nor what they use together",
        "the proxy's port number can be connected to on any host",
        "the metadata (mode, times) of this user's own files can be changed",
    ]
    if probe.landlock_abi < landlock_layer.NETWORK_ABI:
        notes.append("the network is not confined: that takes Landlock ABI 4, Linux 6.7")
    if probe.landlock_abi < landlock_layer.SCOPE_ABI:
        notes.append("signals to other processes of this user are not stopped (Linux 6.12)")
    return tuple(notes)


def _ports(spec: SandboxSpec) -> list[int]:
    return [] if spec.port is None else [spec.port]


def _rlimits(limits: Limits) -> dict[str, list[int]]:
    return {
        # The soft limit's SIGXCPU can be ignored; the hard limit's SIGKILL cannot.
        "RLIMIT_CPU": [limits.cpu_s, limits.cpu_s + 1],
        "RLIMIT_AS": [limits.memory_bytes] * 2,
        "RLIMIT_NOFILE": [limits.open_files] * 2,
        "RLIMIT_FSIZE": [limits.file_bytes] * 2,
        "RLIMIT_CORE": [limits.core_bytes] * 2,
    }


def _zygote_rlimits(limits: Limits) -> dict[str, list[int]]:
    """What an import may take. Not CPU time or descriptors, of which a zygote needs more with each
    child that it has forked."""
    kept = ("RLIMIT_AS", "RLIMIT_FSIZE", "RLIMIT_CORE")
    return {name: limit for name, limit in _rlimits(limits).items() if name in kept}


def _missing(made: Plan, probe: Probe) -> dict[str, str]:
    # What is in gVisor is up to gVisor's kernel: its layer tries that inside.
    stages = ("outer",) if made.tier == "gvisor" else STAGES
    layers = dict.fromkeys(step.layer for stage in stages for step in getattr(made, stage))
    return {
        layer: reason
        for layer in layers
        if (reason := probe.layers.get(layer, "it was not probed"))
    }


def apply(steps: Sequence[Step], context: Context) -> None:
    """Apply the steps, in order, to this process. Raises `StepFailed` at the first failure."""
    for step in steps:
        try:
            APPLY[step.layer](step.args, context)
        except Exception as error:
            raise StepFailed(step.layer, f"{type(error).__name__}: {error}") from error


def to_json(made: Plan) -> dict[str, Any]:
    return dataclasses.asdict(made)


def from_json(data: Mapping[str, Any]) -> Plan:
    stages = {name: tuple(Step(**step) for step in data[name]) for name in STAGES}
    return Plan(tier=data["tier"], weaknesses=tuple(data["weaknesses"]), **stages)
