"""What this machine permits: each layer is tried for real, in a throwaway child.

Sysctls and version numbers lie about what a container, an LSM or a profile really allows.
"""

from __future__ import annotations

import json
import os
import select
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from . import cgroups
from .layers import PROBE, landlock

PROBE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Probe:
    layers: Mapping[str, str]
    """Layer → "" where it is to be had, else the reason why not."""
    landlock_abi: int = 0
    cgroup_version: int = 0
    """1 or 2, where the layer `cgroups` is to be had."""


def probe(checks: Mapping[str, Callable[[], str]] = PROBE) -> Probe:
    """Try every layer, each in a child of its own. The caller must be single-threaded."""
    try:
        landlock_abi = landlock.abi()
    except OSError:
        landlock_abi = 0
    found = {name: _try_in_child(check) for name, check in checks.items()}
    has_groups = found.get("cgroups") == ""
    return Probe(found, landlock_abi, cgroups.find().version if has_groups else 0)


def _try_in_child(check: Callable[[], str]) -> str:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            reason = check()
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
        os.write(writer, json.dumps(reason).encode()[:4096])
        os._exit(0)
    os.close(writer)
    try:
        if not select.select([reader], [], [], PROBE_TIMEOUT_S)[0]:
            os.kill(pid, signal.SIGKILL)
            return f"trying it took longer than {PROBE_TIMEOUT_S} s"
        raw = os.read(reader, 4096)
    finally:
        os.close(reader)
        os.waitpid(pid, 0)
    if not raw:
        return "the process that tried it died"
    return str(json.loads(raw))
