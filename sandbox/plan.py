"""Spec + probe → the ordered steps of each stage. Pure; the result can be printed and compared.

    outer    around all of it, by a program of others; only in the tiers that are called so
    root     once per zygote, before any process of it runs agent code
    zygote   what encloses the zygote before it imports the agent; its children inherit it
    cell     around one child, by its init, which runs no agent code
    child    in the process that becomes the agent
    egress   in the egress proxy, where there is one, before it has heard of any child

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
from .layers import APPLY, PREPARE, Context
from .layers import cgroups as cgroups_layer
from .layers import landlock as landlock_layer
from .layers import root as root_layer
from .layers.scratch import ROOM
from .probe import Probe
from .spec import Limits, SandboxSpec

STAGES = ("outer", "root", "zygote", "cell", "child", "egress")
EGRESS_PORT = 3128
"""Of the egress proxy, in a child's own network; the next one where the caller has taken it."""
MAX_INITS = 4096
"""Processes of its own that stand in the group of a zygote, besides those of its agent's import."""
_DNS_PORT = 53
MAX_SIGNALS = 1024
"""Queued, of one child: signals with a value, and timers."""


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
    egress: tuple[Step, ...] = ()
    allow: tuple[str, ...] = ()
    """What children can reach through the egress proxy."""

    def __str__(self) -> str:
        lines = [f"tier {self.tier}"]
        for stage in STAGES:
            lines += [f"{stage:<8}{step}" for step in getattr(self, stage)]
        lines += [f"allow   {entry}" for entry in self.allow]
        return "\n".join(lines + [f"note    {weakness}" for weakness in self.weaknesses])

    @property
    def num_listeners(self) -> int:
        """In the network of each child."""
        steps = (step for step in self.cell if step.layer == "loopback")
        return sum(len(step.args["ports"]) for step in steps)

    def group(self, stage: str) -> Mapping[str, int] | None:
        """The limits of the group that processes of the stage enter; None: of no group."""
        steps = (step for step in getattr(self, stage) if step.layer == cgroups_layer.NAME)
        return next((step.args for step in steps), None)


def plan(spec: SandboxSpec, probe: Probe) -> Plan:
    """Raises `PlanError` naming every layer of the tier that this machine does not give."""
    tier = strongest(probe) if spec.tier == "auto" else spec.tier
    if lacking := _lacking(tier, spec):
        raise PlanError("; ".join(lacking))
    made = _MAKE[tier](spec, probe)
    if reasons := [f"{layer}: {reason}" for layer, reason in _missing(made, probe).items()]:
        raise PlanError(f"the tier {tier!r} is not to be had here: {'; '.join(reasons)}")
    return made


def _lacking(tier: str, spec: SandboxSpec) -> list[str]:
    """What the spec asks for that the tier does not have, each with what to do instead."""
    sentences = []
    if spec.allow and tier in _WHY_NO_EGRESS:
        sentences.append(
            f"an allowlist ({', '.join(spec.allow)}) takes the tier 'namespaces' or 'bwrap': in "
            f"the tier {tier!r} {_WHY_NO_EGRESS[tier]}"
        )
    if spec.mounts and tier in _WHY_NO_MOUNTS:
        sentences.append(
            f"mounts need a root of the child's own, {_WHY_NO_MOUNTS[tier]}: take the tier "
            "'namespaces' or 'bwrap', or name the folders as readable, at the paths that they have"
        )
    if spec.limits.terminals and tier in _WHY_NO_TERMINALS:
        sentences.append(
            f"terminals take the tier 'namespaces' or 'bwrap': in the tier {tier!r} "
            f"{_WHY_NO_TERMINALS[tier]}"
        )
    if spec.cgroups == "require" and tier == "gvisor":
        sentences.append(
            "cgroups cannot be required in the tier 'gvisor', whose processes are not the host's: "
            "take 'namespaces', 'bwrap' or 'process', or cgroups 'auto', which are none there"
        )
    return sentences


_WHY_NO_EGRESS = {
    "process": "children share the host's network, where no listener is theirs alone",
    "gvisor": "one listener of each child is all that leads out of gVisor",
}
_WHY_NO_MOUNTS = {
    "process": "which the tier 'process' does not make",
    "gvisor": "and those of the tier 'gvisor' share one",
}
_WHY_NO_TERMINALS = {
    "process": "they would be among the host's",
    "gvisor": "children would share them",
}


def strongest(probe: Probe) -> str:
    """The strongest tier that this machine gives. Raises `PlanError` where it gives none."""
    reasons = []
    for tier in ("namespaces", "process"):
        lacking = missing(tier, probe)
        if not lacking:
            return tier
        reasons += [f"{tier}: {layer}: {reason}" for layer, reason in lacking.items()]
    raise PlanError(f"this machine gives no tier; {'; '.join(reasons)}")


def missing(tier: str, probe: Probe) -> dict[str, str]:
    """Layer → why not, of what the tier takes and this machine does not give."""
    return _missing(_MAKE[tier](SandboxSpec(tier=tier), probe), probe)


def has_groups(spec: SandboxSpec, probe: Probe) -> bool:
    """Whether children get a cgroup each."""
    return spec.cgroups == "require" or (
        spec.cgroups == "auto" and not probe.layers.get(cgroups_layer.NAME, "it was not probed")
    )


def _group(spec: SandboxSpec, probe: Probe, limits: Mapping[str, int]) -> tuple[Step, ...]:
    return (Step("cgroups", limits),) if has_groups(spec, probe) else ()


def _zygote_group(limits: Limits) -> dict[str, int]:
    """Whatever import-time code forks, with the inits of the tier `process`, stays in there."""
    return {
        "memory_bytes": limits.memory_bytes + limits.total_memory_bytes,
        "processes": limits.processes + MAX_INITS,
    }


def _child_group(limits: Limits) -> dict[str, int]:
    return {
        "memory_bytes": limits.total_memory_bytes,
        "processes": limits.processes,
        "cpu_s": limits.total_cpu_s,
    }


def _why_no_groups(spec: SandboxSpec) -> str:
    return "cgroups are off" if spec.cgroups == "off" else "no cgroups: the doctor says why"


def _namespaces(spec: SandboxSpec, probe: Probe) -> Plan:
    limits = spec.limits
    with_groups = has_groups(spec, probe)
    polled = {
        "memory_bytes": limits.total_memory_bytes,
        "cpu_s": limits.total_cpu_s,
        "sockets_only": with_groups,
    }
    # Counted per user: here per child, each of which has a user namespace of its own.
    per_user = {"RLIMIT_NPROC": limits.processes, "RLIMIT_SIGPENDING": MAX_SIGNALS}
    rlimits = {**_rlimits(limits), **{name: [limit] * 2 for name, limit in per_user.items()}}
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
            Step(
                "root",
                {
                    "readable": list(spec.readable),
                    "hidden": list(spec.hidden),
                    "mounts": dict(spec.mounts),
                },
            ),
            Step("scratch", {**scratch, "terminals": 0, "proc": False}),
            Step("loopback", {"ports": []}),
        ),
        zygote=(
            *_group(spec, probe, _zygote_group(limits)),
            # To put a new child into the pid namespace of its cell; nothing else is left to do
            # with it, see seccomp.
            Step("capabilities", {"keep": [kernel.CAP_SYS_ADMIN]}),
            Step("no_new_privs", {}),
            Step("landlock", landlock),
            Step("rlimits", _zygote_rlimits(limits)),
            Step("seccomp", {"permit": ["setns"], "only_tcp": False}),
        ),
        cell=(
            Step("namespaces", {}),
            Step("scratch", {**scratch, "terminals": limits.terminals, "proc": True}),
            Step(
                "loopback", {"ports": _ports(spec) + ([_egress_port(spec)] if spec.allow else [])}
            ),
            Step("polled_limits", polled),
        ),
        child=(
            *_group(spec, probe, _child_group(limits)),
            Step("session", {"umask": 0o077}),
            Step("descriptors", {}),
            Step("environ", {"env": environment(spec)}),
            Step("randomness", {}),
            Step("rlimits", rlimits),
            Step("capabilities", {"keep": []}),
            Step("no_new_privs", {}),
            Step("seccomp", {"deny": ["setns"]}),
        ),
        egress=_egress(spec.allow) if spec.allow else (),
        allow=spec.allow,
        weaknesses=()
        if with_groups
        else (
            "memory and CPU of all processes of a child together are looked at twice a second "
            f"({_why_no_groups(spec)})",
        ),
    )


def _bwrap(spec: SandboxSpec, probe: Probe) -> Plan:
    inner = _namespaces(spec, probe)
    # What is to be mounted within has to be there first.
    shown = [*spec.readable, *spec.mounts.values()]
    outer = Step("bwrap", {"readable": shown, "hidden": list(spec.hidden)})
    return dataclasses.replace(inner, tier="bwrap", outer=(outer,))


def _egress(allow: Sequence[str]) -> tuple[Step, ...]:
    """It reads what hostile children send: it needs no file but the resolver's, and no port but
    those on the list."""
    landlock = {
        "readable": [*root_layer.SYSTEM_PATHS, *root_layer.ETC_PATHS, *_RESOLVER_PATHS],
        "hidden": [],
        "writable": list(root_layer.DEVICES),
        "own_folder": False,
        "ports": sorted({_DNS_PORT, *(int(entry.rpartition(":")[2]) for entry in allow)}),
    }
    return (
        Step("capabilities", {"keep": []}),
        Step("no_new_privs", {}),
        Step("landlock", landlock),
        Step("rlimits", {"RLIMIT_CORE": [kernel.NO_CORE] * 2}),
        Step("seccomp", {"permit": [], "only_tcp": False}),
    )


_RESOLVER_PATHS = (
    "/etc/hosts",
    "/etc/host.conf",
    "/etc/resolv.conf",
    # Where that one leads to, and is replaced.
    "/run/NetworkManager",
    "/run/resolvconf",
    "/run/systemd/resolve",
)


def environment(spec: SandboxSpec) -> dict[str, str]:
    """The base environment of zygote and children: with an allowlist, the way out is in it."""
    env = dict(spec.env)
    if spec.allow:
        url = f"http://127.0.0.1:{_egress_port(spec)}"
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
            env[name] = env[name.lower()] = "127.0.0.1,localhost,::1" if name[0] == "N" else url
        env["NODE_USE_ENV_PROXY"] = "1"  # Node 22.21 and 24: without it none of these counts
    return env


def _egress_port(spec: SandboxSpec) -> int:
    return EGRESS_PORT + (spec.port == EGRESS_PORT)


def _process(spec: SandboxSpec, probe: Probe) -> Plan:
    readable = [
        *root_layer.SYSTEM_PATHS,
        *root_layer.ETC_PATHS,
        "/etc/hosts",
        "/proc",
        *spec.readable,
    ]
    common = {
        "readable": readable,
        "hidden": list(spec.hidden),
        "writable": list(root_layer.DEVICES),
        "own_folder": True,
        "ports": _ports(spec),
    }
    return Plan(
        tier="process",
        root=(),
        zygote=(
            *_group(spec, probe, _zygote_group(spec.limits)),
            # Root's: with CAP_PERFMON alone every process's environment can be read.
            Step("capabilities", {"keep": []}),
            Step("no_new_privs", {}),
            Step("landlock", common),
            Step("rlimits", _zygote_rlimits(spec.limits)),
            Step("seccomp", {"permit": [], "only_tcp": True}),
        ),
        cell=(),
        child=(
            *_group(spec, probe, _child_group(spec.limits)),
            Step("session", {"umask": 0o077}),
            Step("descriptors", {}),
            Step("environ", {"env": dict(spec.env)}),
            Step("randomness", {}),
            Step("rlimits", _rlimits(spec.limits)),
            Step("no_new_privs", {}),
            Step("landlock", common),
        ),
        weaknesses=_process_weaknesses(spec, probe),
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
            Step("rlimits", _zygote_rlimits(spec.limits)),
            Step("seccomp", {"permit": ["unshare", "SIOCSIFFLAGS"], "only_tcp": False}),
        ),
        cell=(Step("some_namespaces", {}), Step("loopback", {"ports": _ports(spec)})),
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
            "the number of processes of a child is not limited, nor what they use together (there "
            "are no cgroups in gVisor)",
        ),
    )


_MAKE = {"namespaces": _namespaces, "process": _process, "bwrap": _bwrap, "gvisor": _gvisor}


def _process_weaknesses(spec: SandboxSpec, probe: Probe) -> tuple[str, ...]:
    notes = [
        "other processes and the paths of files can be listed, though not read",
        "the proxy's port number can be connected to on any host",
        "the metadata (mode, times) of this user's own files can be changed",
    ]
    if not has_groups(spec, probe):
        notes.append(
            "the number of processes of a child is not limited, nor what they use together "
            f"({_why_no_groups(spec)})"
        )
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
        "RLIMIT_CORE": [limits.core_bytes or kernel.NO_CORE] * 2,  # from then on, seccomp keeps it
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


def prepare(steps: Sequence[Step]) -> None:
    """Compute what applying the steps takes, in the process that forks those who will do it."""
    for step in steps:
        if step.layer in PREPARE:
            PREPARE[step.layer](step.args)


def to_json(made: Plan) -> dict[str, Any]:
    return dataclasses.asdict(made)


def from_json(data: Mapping[str, Any]) -> Plan:
    stages: dict[str, Any] = {name: tuple(Step(**step) for step in data[name]) for name in STAGES}
    texts = {name: tuple(data[name]) for name in ("weaknesses", "allow")}
    return Plan(data["tier"], **stages, **texts)
