"""`SandboxSpec`: what children may do, declared. Plain data, to JSON and back.

Called by whoever starts a zygote; `plan` turns it into steps. Everything is checked on
construction, so that a spec that exists is a valid one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .allowlist import parse_entry
from .errors import SpecError

TIERS = ("auto", "namespaces", "process", "bwrap", "gvisor")
CGROUPS = ("auto", "off", "require")

# Variables that make a loader or an interpreter run other code. They never enter the environment
# that a zygote is started with.
LOADER_PREFIXES = ("LD_", "PYTHON", "DYLD_", "GCONV_")

RESERVED_FOLDERS = frozenset({"box", "dev", "etc", "proc", "run", "sys", "tmp"})
"""Top folders of a child's root that nothing can be mounted in."""


_SMALLEST: Mapping[str, float] = {"wall_s": 1e-3, "core_bytes": 0, "terminals": 0}
"""Of limits; 1 of the others."""


@dataclass(frozen=True)
class Limits:
    """Limits of one child. Those "per process" hold for each of its processes separately."""

    wall_s: float = 300.0
    cpu_s: int = 3600
    """Per process; SIGXCPU at the limit, SIGKILL a second later."""
    memory_bytes: int = 8 * 2**30
    """Per process: address space."""
    open_files: int = 1024
    """Per process."""
    file_bytes: int = 2**30
    """Per file."""
    core_bytes: int = 0
    output_bytes: int = 4 * 2**20
    """stdout and stderr together; more ends the child."""
    result_bytes: int = 2**20
    """The result message; more ends the child."""
    total_memory_bytes: int = 8 * 2**30
    """Of all its processes together. By its cgroup; without one measured twice a second, in the
    tier `namespaces` only."""
    total_cpu_s: int = 3600
    """Of all its processes together, as above."""
    processes: int = 256
    """Processes and threads together. Tier `namespaces`, or where there are cgroups."""
    scratch_bytes: int = 2**29
    """All files together, in memory. Tier `namespaces` only."""
    scratch_files: int = 2**16
    """Files and folders together. Tier `namespaces` only."""
    workspace_bytes: int = 2**28
    """All files of a workspace's template together."""
    workspace_files: int = 2**15
    """Files and folders of a workspace's template."""
    outputs_bytes: int = 2**24
    """All outputs together."""
    outputs_files: int = 2**12
    """Files and folders that are looked at for outputs."""
    terminals: int = 0
    """Pseudo-terminals, for agents that drive others by tmux or pexpect; 0: not even the device
    that makes them. Tiers `namespaces` and `bwrap`."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            number = (int, float) if f.name == "wall_s" else int
            smallest = _SMALLEST.get(f.name, 1)
            if isinstance(value, bool) or not isinstance(value, number):
                raise SpecError(f"limits.{f.name} must be a number, not {value!r}")
            if not smallest <= value < 2**63:
                raise SpecError(
                    f"limits.{f.name} must be at least {smallest} and below 2**63, not {value!r}"
                )


@dataclass(frozen=True)
class SandboxSpec:
    """What a zygote and its children may do. What holds in the tier `namespaces` does in `bwrap`,
    too."""

    tier: str = "auto"
    """Which set of layers; `auto`: the strongest that this machine gives."""
    env: Mapping[str, str] = field(default_factory=dict)
    """The whole base environment."""
    limits: Limits = field(default_factory=Limits)
    readable: tuple[str, ...] = ()
    """Absolute paths that can be read, beside the system's and the interpreter's own."""
    hidden: tuple[str, ...] = ()
    """Absolute paths of folders and files within those that cannot."""
    mounts: Mapping[str, str] = field(default_factory=dict)
    """Where it is inside → what it is outside, both absolute: more to read, at paths of their own.
    Tier `namespaces` only."""
    port: int | None = None
    """The one TCP port that can be connected to. In the tier `namespaces` it is of 127.0.0.1 in
    the child's own network, with a listener that the caller gets; in the tier `process` a rule for
    ports, which does not know hosts."""
    allow: tuple[str, ...] = ()
    """What can be reached beside that, through an egress proxy: "host:port" each, a name, an IP
    address or "*.example.com" for the names below it. Tier `namespaces` only. A name never leads
    to an address that is not public, unless that address is listed, too."""
    cgroups: str = "auto"
    """Memory, processes and CPU of a child by a group that the kernel bounds: where this machine
    gives one (`auto`), never (`off`), or else not at all (`require`)."""

    def __post_init__(self) -> None:
        if self.tier not in TIERS:
            raise SpecError(f"unknown sandbox tier {self.tier!r}; there are: {', '.join(TIERS)}")
        if self.cgroups not in CGROUPS:
            raise SpecError(f"cgroups: {self.cgroups!r} is none of: {', '.join(CGROUPS)}")
        check_env(self.env)
        for name in ("readable", "hidden"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            for path in getattr(self, name):
                _check_absolute(name, path)
        _check_mounts(self.mounts)
        if self.port is not None and not (type(self.port) is int and 0 < self.port < 2**16):
            raise SpecError(f"port: {self.port!r} is not a TCP port")
        object.__setattr__(self, "allow", _checked_allowlist(self.allow))
        for name in self.env:
            if name.startswith(LOADER_PREFIXES):
                raise SpecError(f"the variable {name!r} steers a loader: it cannot be given")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> SandboxSpec:
        """Raises `SpecError` naming the field."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise SpecError(f"the sandbox spec is not JSON: {error}") from None
        values = _known_fields(cls, data, "spec")
        if "limits" in values:
            values["limits"] = Limits(**_known_fields(Limits, values["limits"], "limits"))
        return cls(**values)


def is_text(value: object) -> bool:
    """A string that a system call takes: without NUL, and not with half of a character."""
    return isinstance(value, str) and "\0" not in value and is_whole(value)


def is_whole(text: str) -> bool:
    """Whether no half of a character is in it."""
    try:
        text.encode("utf-8", "surrogateescape")  # as children do, whatever the caller's locale is
    except UnicodeEncodeError:
        return False
    return True


def check_env(env: object) -> None:
    """Raises `SpecError` unless `env` maps valid variable names to strings."""
    if not isinstance(env, Mapping):
        raise SpecError(f"an environment must be a mapping, not {type(env).__name__}")
    for name, value in env.items():
        if not is_text(name) or not name or "=" in name:
            raise SpecError(f"{name!r} cannot be the name of an environment variable")
        if not is_text(value):
            raise SpecError(f"the environment variable {name!r} must be a string without NUL")


def _checked_allowlist(entries: object) -> tuple[str, ...]:
    if not isinstance(entries, (list, tuple)):
        raise SpecError(f"allow must be a list of host:port, not {entries!r}")
    checked = []
    for entry in entries:
        try:
            checked.append(parse_entry(entry) if isinstance(entry, str) else "")
        except ValueError as error:
            raise SpecError(f"allow: {entry!r}: {error}") from None
        if not checked[-1]:
            raise SpecError(f"allow: {entry!r} is not host:port")
    return tuple(dict.fromkeys(checked))


def _check_absolute(name: str, path: object) -> None:
    if not isinstance(path, str) or not path.startswith("/") or "\0" in path:
        raise SpecError(f"{name}: {path!r} is not an absolute path")


def _check_mounts(mounts: object) -> None:
    if not isinstance(mounts, Mapping):
        raise SpecError(f"mounts must map paths to paths, not be {type(mounts).__name__}")
    for inside, outside in mounts.items():
        _check_absolute("mounts", inside)
        _check_absolute("mounts", outside)
        parts = inside.split("/")[1:]
        if any(part in ("", ".", "..") for part in parts):
            raise SpecError(f"mounts: {inside!r} must be a plain path below /")
        if parts[0] in RESERVED_FOLDERS:
            raise SpecError(f"mounts: {inside!r} lies in /{parts[0]}, which is the sandbox's own")
        if any(inside.startswith(f"{other}/") for other in mounts):
            raise SpecError(f"mounts: {inside!r} lies in another mount")


def _known_fields(cls: type[Any], data: object, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise SpecError(f"{where} must be a JSON object, not {type(data).__name__}")
    names = [f.name for f in dataclasses.fields(cls)]
    for key in data:
        if key not in names:
            raise SpecError(f"{where} has no field {key!r}; there are: {', '.join(names)}")
    return data
