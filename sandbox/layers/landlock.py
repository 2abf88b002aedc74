"""Landlock: only the named paths and ports, and no signal to a process outside.

Needs no privilege and cannot be undone; every process of the child inherits it. What it cannot do:
hide that a path exists (stat), or stop chmod, utime and setxattr on what the user owns outside.
Format: linux/landlock.h, https://docs.kernel.org/userspace-api/landlock.html
"""

from __future__ import annotations

import functools
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .. import kernel
from .context import Context

NAME = "landlock"

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
TRUNCATE, IOCTL_DEV = 1 << 14, 1 << 15
_OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
_READ = EXECUTE | READ_FILE | READ_DIR
_BIND_TCP, _CONNECT_TCP = 1, 2
_SCOPE_ABSTRACT_SOCKETS, _SCOPE_SIGNALS = 1, 2
_RULE_PATH_BENEATH, _RULE_NET_PORT = 1, 2
_CREATE_RULESET_VERSION = 1

NETWORK_ABI = 4  # Linux 6.7
SCOPE_ABI = 6  # Linux 6.12
LOG_ABI = 7  # Linux 6.15
# Where the host audits, each refusal would be a record of its own: of this domain, and of those
# that a child makes for itself.
_LOG_SAME_EXEC_OFF, _LOG_SUBDOMAINS_OFF = 1, 4


def abi() -> int:
    """The version of Landlock that this kernel speaks. Raises `OSError` where it has none."""
    return kernel.syscall(
        "landlock_create_ruleset",
        kernel.SYS_LANDLOCK_CREATE_RULESET,
        None,
        0,
        _CREATE_RULESET_VERSION,
    )


def probe() -> str:
    try:
        kernel.set_no_new_privs()
        _restrict(abi(), readable=["/"], hidden=[], writable=[], ports=[])
    except OSError as error:
        return (
            f"the kernel refuses it ({error}); it needs Linux 5.13 or later, with 'landlock' in "
            "the boot parameter lsm="
        )
    return ""


def apply(args: Mapping[str, Any], context: Context) -> None:
    """`readable`, `writable`: paths, with all below them, where they exist; `hidden`: folders below
    those whose files cannot be read; `own_folder`: is the child's folder writable, too; `ports`:
    which TCP ports may be connected to, or None for no rule about the network."""
    writable = [*args["writable"], *([context.folder] if args["own_folder"] else [])]
    ports = args["ports"]
    _restrict(
        abi(),
        readable=[*args["readable"], *context.readable],
        hidden=args["hidden"],
        writable=writable,
        ports=None if ports is None else [*ports, *context.ports],
    )


def _restrict(
    version: int,
    *,
    readable: Iterable[str],
    hidden: Iterable[str],
    writable: Iterable[str],
    ports: Iterable[int] | None,
) -> None:
    fs = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    net = _BIND_TCP | _CONNECT_TCP if version >= NETWORK_ABI and ports is not None else 0
    scoped = _SCOPE_ABSTRACT_SOCKETS | _SCOPE_SIGNALS if version >= SCOPE_ABI else 0
    attributes = struct.pack("=QQQ", fs, net, scoped)
    size = 8 if version < NETWORK_ABI else 16 if version < SCOPE_ABI else 24
    ruleset = kernel.syscall(
        "landlock_create_ruleset",
        kernel.SYS_LANDLOCK_CREATE_RULESET,
        attributes,
        kernel.size_t(size),
        0,
    )
    try:
        for path, rights in _reading_rules(tuple(readable), tuple(hidden)):
            _allow_path(ruleset, path, rights)
        for path in writable:
            if os.path.exists(path):
                _allow_path(ruleset, path, fs)
        for port in ports or () if net else ():
            rule = struct.pack("=QQ", _CONNECT_TCP, port)
            _add_rule(ruleset, _RULE_NET_PORT, rule, f"port {port}")
        flags = _LOG_SAME_EXEC_OFF | _LOG_SUBDOMAINS_OFF if version >= LOG_ABI else 0
        kernel.syscall("landlock_restrict_self", kernel.SYS_LANDLOCK_RESTRICT_SELF, ruleset, flags)
    finally:
        os.close(ruleset)


@functools.cache
def _reading_rules(readable: tuple[str, ...], hidden: tuple[str, ...]) -> list[tuple[str, int]]:
    """(path, rights) each. Found once: a zygote's children find them there."""
    concealed = [os.path.realpath(path) for path in hidden]
    return [rule for path in readable for rule in _rules_below(path, concealed)]


def _rules_below(path: str, hidden: list[str]) -> Iterator[tuple[str, int]]:
    """Rules only ever add rights: a folder with a hidden one below it is allowed bit by bit.

    Listing it is allowed as a whole, since that is how Python imports: names can be seen.
    """
    if not os.path.exists(path):
        return
    real = os.path.realpath(path)
    if any(f"{real}/".startswith(f"{folder}/") for folder in hidden):
        return
    if not any(folder.startswith(real.rstrip("/") + "/") for folder in hidden):
        yield real, _READ
        return
    yield real, READ_DIR
    with os.scandir(real) as entries:
        for entry in entries:
            if not entry.is_symlink():  # what it leads to may be outside, or hidden
                yield from _rules_below(entry.path, hidden)


def _allow_path(ruleset: int, path: str, rights: int) -> None:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _OF_FILES
        _add_rule(ruleset, _RULE_PATH_BENEATH, struct.pack("=Qi", rights, fd), path)
    finally:
        os.close(fd)


def _add_rule(ruleset: int, kind: int, rule: bytes, what: str) -> None:
    kernel.syscall(
        f"landlock_add_rule {what}", kernel.SYS_LANDLOCK_ADD_RULE, ruleset, kind, rule, 0
    )
