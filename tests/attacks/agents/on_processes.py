"""Attacks 17-32: other processes, ways out of the limits on one's own, and secrets."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import random
import re
import resource
import signal
import socket
import ssl
import struct
import time
import uuid
from collections.abc import Iterator
from functools import partial
from typing import Any

from calls import Attempt, Refused, attempt, call, forked, raw_call, read_file

CLONE_NEWUSER, CLONE_NEWNS, CLONE_PARENT = 0x10000000, 0x00020000, 0x8000
MAX_FORKS = 300
# In parts, so that neither this pattern nor its source is what it looks for.
CANARY = re.compile(rb"CAN" rb"ARY-[a-z_]+-[0-9a-f]{16}")


def a17(data: dict[str, Any]) -> str:
    """Signals. 0 asks for nothing but the permission, so success harms nobody."""
    parent, victim = os.getppid(), data["victim"]

    def by_pidfd() -> None:
        call("pidfd_send_signal", call("pidfd_open", victim, 0), signal.SIGTERM, None, 0)

    def by_event() -> None:
        """A pipe that can be read sends a signal to its owner, whoever that is said to be."""
        reader, writer = os.pipe()
        fcntl.fcntl(reader, fcntl.F_SETOWN, victim)
        fcntl.fcntl(reader, fcntl.F_SETSIG, signal.SIGTERM)
        fcntl.fcntl(reader, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
        os.write(writer, b"x")
        raise Refused("was not sent")  # else the world is not intact

    def by_socket(request: int) -> None:
        """The same of sockets, by ioctl: FIOSETOWN, SIOCSPGRP."""
        near, far = socket.socketpair()
        fcntl.ioctl(near, request, struct.pack("i", victim))
        fcntl.fcntl(near, fcntl.F_SETSIG, signal.SIGTERM)
        fcntl.fcntl(near, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
        far.send(b"x")
        raise Refused("was not sent")  # else the world is not intact

    def any_process() -> str:
        """kill(-1) returns 0 even where it was refused for each single process."""
        reasons = set()
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) != os.getpid():
                try:
                    os.kill(int(name), 0)
                except OSError as error:
                    reasons.add(errno.errorcode[error.errno or 0])
                else:
                    return name
        raise Refused(" ".join(sorted(reasons)) or "ESRCH")

    return attempt(
        ("any process", any_process),
        *([("the parent", lambda: os.kill(parent, 0))] if parent else []),
        ("pid 1", lambda: os.kill(1, 0)),
        ("another process", lambda: os.kill(victim, signal.SIGTERM)),
        ("the guardian", lambda: os.kill(data["guardian"], 0)),
        ("its group", lambda: os.killpg(data["guardian"], 0)),
        ("tgkill", lambda: call("tgkill", victim, victim, signal.SIGTERM)),
        ("pidfd", by_pidfd),
        ("F_SETOWN", by_event),
        ("FIOSETOWN", lambda: by_socket(0x8901)),
        ("SIOCSPGRP", lambda: by_socket(0x8902)),
    )


def a18(data: dict[str, Any]) -> str:
    """The memory and descriptors of a process outside."""
    attach, seize = 16, 0x4206
    buffer = ctypes.create_string_buffer(64)
    local = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), 64)

    def take_descriptor(pid: int) -> int:
        return call("pidfd_getfd", call("pidfd_open", pid, 0), 1, 0)

    attempts: list[Attempt] = []
    for pid in (data["victim"], data["guardian"], os.getppid() or 1):
        attempts += [
            ("attach", partial(call, "ptrace", attach, pid, 0, 0)),
            ("seize", partial(call, "ptrace", seize, pid, 0, 0)),
            ("readv", partial(call, "process_vm_readv", pid, local, 1, local, 1, 0)),
            ("writev", partial(call, "process_vm_writev", pid, local, 1, local, 1, 0)),
            ("getfd", partial(take_descriptor, pid)),
            ("mrelease", partial(call, "process_mrelease", -1, 0)),
            ("kcmp", partial(call, "kcmp", os.getpid(), pid, 0, 1, 1)),
            ("/proc/mem", read_file(f"/proc/{pid}/mem")),
        ]
    return attempt(*attempts)


def a19(data: dict[str, Any]) -> str:
    """List the processes outside, their command lines and how many files they have open."""
    seen = [name for name in os.listdir("/proc") if name.isdigit() and name != str(os.getpid())]
    lines = []
    for pid in [*seen, str(data["victim"])]:
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                lines.append(file.read(80))
        except OSError:
            continue
    if seen or lines:
        return f"SUCCEEDED: saw {len(seen)} processes, command lines of {len(lines)}"
    return "stopped: absent"


def a20(data: dict[str, Any]) -> str:
    """A daemon that ignores every signal and has left its parent, session and group."""
    ready, told = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
            for number in range(1, 65):
                try:
                    signal.signal(number, signal.SIG_IGN)
                except (OSError, ValueError):
                    continue
            name_process(data["daemon"])
            os.write(told, b"x")
            while True:
                time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    return "left"


def a20b(data: dict[str, Any]) -> str:
    """Processes that are each gone when a signal comes: they fork, and end, as fast as they can;
    and are the reapers of what they leave."""
    libc = ctypes.CDLL(None)
    set_child_subreaper = 36

    def comet() -> None:
        os.setsid()
        name_process(data["daemon"])
        until = time.monotonic() + 30
        while time.monotonic() < until:
            libc.prctl(set_child_subreaper, 1, 0, 0, 0)
            if libc.fork():  # without what Python does around a fork
                libc._exit(0)
        libc._exit(0)

    with contextlib.suppress(BlockingIOError):  # as many as there may be: some are enough
        for _ in range(16):
            forked(comet)
    time.sleep(0.5)
    return "left"


def name_process(name: str) -> None:
    ctypes.CDLL(None).prctl(15, name.encode(), 0, 0, 0)


def a21(data: dict[str, Any]) -> str:
    """As many processes as there may be, at most `MAX_FORKS`."""

    def bomb() -> str:
        for _ in range(MAX_FORKS):
            if os.fork() == 0:
                while True:
                    time.sleep(60)
        return f"{MAX_FORKS} processes"

    return attempt(("fork", bomb))


def a22(data: dict[str, Any]) -> str:
    """A user namespace of one's own."""

    def by_clone(flags: int) -> str:
        pid = call("clone", flags | signal.SIGCHLD, 0, 0, 0, 0)
        if pid == 0:
            os._exit(0)
        return f"process {pid}"

    def by_clone3() -> str:
        arguments = (ctypes.c_uint64 * 8)(CLONE_NEWUSER, 0, 0, 0, signal.SIGCHLD, 0, 0, 0)
        pid = call("clone3", arguments, 64)
        if pid == 0:
            os._exit(0)
        return f"process {pid}"

    return attempt(
        ("unshare", lambda: call("unshare", CLONE_NEWUSER)),
        ("unshare mounts", lambda: call("unshare", CLONE_NEWNS)),
        ("clone", lambda: by_clone(CLONE_NEWUSER)),
        ("clone, more bits", lambda: by_clone(CLONE_NEWUSER | CLONE_NEWNS | 2**32)),
        ("clone3", by_clone3),
    )


def a23(data: dict[str, Any]) -> str:
    """Into the namespaces of others."""

    def enter(path: str) -> str:
        return f"entered {path}: {call('setns', os.open(path, os.O_RDONLY), 0)}"

    attempts: list[Attempt] = []
    pids = ["1", str(os.getppid() or 1), str(data["victim"])]
    if not data.get("at_import"):  # a zygote may enter the namespaces that it is in already
        pids.append("self")
    for pid in pids:
        for name in ("user", "mnt", "net", "pid"):
            path = f"/proc/{pid}/ns/{name}"
            attempts.append((name, partial(enter, path)))
    pidfd = ("pidfd", lambda: call("setns", call("pidfd_open", data["victim"], 0), CLONE_NEWNS))
    return attempt(*attempts, pidfd)


def a24a(data: dict[str, Any]) -> str:
    """The x32 entry point: getpid."""
    return f"SUCCEEDED: {raw_call(0x40000000 | 39)}"


def a24b(data: dict[str, Any]) -> str:
    """The i386 entry point: getpid by `int 0x80`."""
    code = b"\xb8\x14\x00\x00\x00\xcd\x80\xc3"  # mov eax, 20; int 0x80; ret
    page = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 7)
    page.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return f"SUCCEEDED: {ctypes.CFUNCTYPE(ctypes.c_int)(address)()}"


def a25(data: dict[str, Any]) -> str:
    """More of the processor than is due."""
    all_cpus = (ctypes.c_ulong * 16)(*[2**64 - 1] * 16)
    real_time = (ctypes.c_int * 1)(1)
    deadline = ctypes.create_string_buffer(struct.pack("=IIQiIQQQ", 48, 6, 0, 0, 0, 1, 2, 2), 48)
    return attempt(
        ("real-time", lambda: call("sched_setscheduler", 0, 1, real_time)),
        ("deadline", lambda: call("sched_setattr", 0, deadline, 0)),
        ("nice", lambda: call("setpriority", 0, 0, -5)),
        ("affinity", lambda: call("sched_setaffinity", 0, 128, all_cpus)),
        ("a core of one's own", lambda: call("prctl", 62, 1, 0, 0, 0)),  # PR_SCHED_CORE
        ("real-time I/O", lambda: call("ioprio_set", 1, 0, (1 << 13) | 0)),
    )


def a26a(data: dict[str, Any]) -> str:
    """Raise one's own limits."""

    def lift(which: int) -> str:
        _, hard = resource.getrlimit(which)
        call("prlimit64", 0, which, (ctypes.c_uint64 * 2)(hard + 1, hard + 1), None)
        return f"limit {which} above {hard}"

    def oom() -> None:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("-1000")

    names = ("NOFILE", "AS", "FSIZE", "CPU")  # CORE: see a43
    lifts = [(name, lambda n=name: lift(getattr(resource, f"RLIMIT_{n}"))) for name in names]
    return attempt(*lifts, ("oom_score_adj", oom))


def a26b(data: dict[str, Any]) -> str:
    """Lower the limits and the priority of a process outside."""
    victim = data["victim"]
    lower = (ctypes.c_uint64 * 2)(100, 100)
    return attempt(
        ("prlimit", lambda: call("prlimit64", victim, resource.RLIMIT_NOFILE, lower, None)),
        ("nice", lambda: call("setpriority", 0, victim, 19)),
        ("idle I/O", lambda: call("ioprio_set", 1, victim, 3 << 13)),
    )


def a27(data: dict[str, Any]) -> str:
    """Inherited descriptors, and what is behind the standard ones."""
    names: dict[int, str] = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            names[int(entry)] = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:  # the listing's own
            continue
    kinds = {fd: name.partition(":")[0] for fd, name in names.items()}
    expected = {0: "/dev/null", 1: "pipe", 2: "pipe", 3: "pipe"}
    return "stopped: none" if kinds == expected else f"SUCCEEDED: {names}"


def a28(data: dict[str, Any]) -> str:
    """The environment, as it is and as it was when the process began."""
    found = canaries(_environment())
    with open("/proc/self/environ", "rb") as file:
        found += canaries(file.read())
    return f"SUCCEEDED: {found}" if found else "stopped: none"


def _environment() -> bytes:
    return b"\0".join(name + b"=" + value for name, value in os.environb.items())


def canaries(raw: bytes) -> list[str]:
    """Those that are in `raw`, each once."""
    return sorted({match.decode() for match in CANARY.findall(raw)})


def memory() -> Iterator[bytes]:
    """All of this process's readable memory, part by part."""
    with open("/proc/self/maps") as file:
        lines = file.read().splitlines()
    part_bytes = 2**20
    with open("/proc/self/mem", "rb", buffering=0) as mem:
        for line in lines:
            addresses, permissions, *_ = line.split()
            if not permissions.startswith("r") or "[v" in line:  # vvar, vsyscall: the kernel's
                continue
            start, end = (int(address, 16) for address in addresses.split("-"))
            while start < end:
                try:
                    mem.seek(start)
                    part = mem.read(min(part_bytes, end - start))
                except (OSError, OverflowError, ValueError):
                    break
                if not part:
                    break
                yield part
                start += max(1, len(part) - 64) if len(part) == part_bytes else len(part)


def a29(data: dict[str, Any]) -> str:
    """The keys of others in one's own memory. One's own key shows that the search finds keys."""
    found: set[str] = set()
    for part in memory():
        found.update(canaries(part))
    own = {name for name in found if "-own-" in name}
    if not own:
        return "the search is blind: it does not find the child's own key"
    return f"SUCCEEDED: {sorted(found - own)}" if found - own else "stopped: none"


def a30(data: dict[str, Any]) -> str:
    """Where the files that can be read lie on the host."""
    with open("/proc/self/mountinfo") as file:
        fields = [line.split() for line in file]
    told = [line[3] for line in fields if line[3] != "/"]
    told += [line[-2] for line in fields if line[-2].startswith("/dev/")]
    return f"SUCCEEDED: {sorted(set(told))[:3]}" if told else "stopped: masked"


def a31(data: dict[str, Any]) -> str:
    """What the kernel says about the machine."""
    names = ("keys", "key-users", "kallsyms", "kmsg", "kcore", "modules", "cmdline", "sched_debug")
    paths = [f"/proc/{name}" for name in (*names, "sys/kernel/core_pattern", "timer_list")]
    paths += ["/dev/kmsg", "/dev/mem", "/sys/kernel/notes", "/sys/class/net/lo/address"]
    listings = [(path, lambda path=path: str(os.listdir(path))) for path in ("/sys", "/proc/sys")]
    return attempt(*listings, *((path, read_file(path)) for path in paths))


def a32(data: dict[str, Any]) -> dict[str, Any]:
    """What siblings could share."""
    return {
        "random": random.random(),
        "tls": ssl.RAND_bytes(16).hex(),
        "uuid": str(uuid.uuid4()),
        "hash seed": hash("seed"),
        "addresses": id(data.__class__),
    }


def a49(data: dict[str, Any]) -> str:
    """One of two siblings, which want to pass a descriptor: by an abstract name, or by a path."""
    if data["part"] == "receiver":
        return _receive_descriptor(data)
    reader, writer = os.pipe()
    os.write(writer, b"from a sibling")
    paths = [f"{folder}/{data['name']}" for folder in siblings_folders()]
    addresses = ["\0" + data["name"], data["name"], *paths]
    deadline = time.monotonic() + 1.0
    reasons: set[str] = set()
    while time.monotonic() < deadline:
        for address in addresses:
            try:
                with socket.socket(socket.AF_UNIX) as door:
                    door.connect(address)
                    socket.send_fds(door, [b"x"], [reader])
                return f"SUCCEEDED: {address!r}"
            except OSError as error:
                reasons.add(errno.errorcode.get(error.errno or 0, str(error)))
        time.sleep(0.05)
    return "stopped: " + ", ".join(sorted(reasons))


def siblings_folders() -> list[str]:
    """Where the working directories of siblings are, <zygote's folder>/<number>/work, in tiers
    where they share a file system."""
    *above, number, name = os.getcwd().split("/")
    own = int(number) if number.isdigit() else 0
    near = [own + step for step in range(-4, 5) if step]
    return ["/".join([*above, str(each), name]) for each in near]


def _receive_descriptor(data: dict[str, Any]) -> str:
    doors = []
    for address in ("\0" + data["name"], data["name"]):
        try:
            door = socket.socket(socket.AF_UNIX)
            door.bind(address)
            door.listen()
            door.setblocking(False)
            doors.append(door)
        except OSError:
            continue
    deadline = time.monotonic() + 2.0
    while time.monotonic() < deadline:
        for door in doors:
            try:
                connection, _ = door.accept()
            except BlockingIOError:
                continue
            connection.settimeout(1.0)
            _, fds, _, _ = socket.recv_fds(connection, 1, 1)
            return f"SUCCEEDED: {os.read(fds[0], 64).decode()}"
        time.sleep(0.02)
    return "stopped: nobody came"


def a54a(data: dict[str, Any]) -> None:
    """Ignore everything and stay."""
    _ignore_all()
    while True:
        time.sleep(60)


def a54b(data: dict[str, Any]) -> None:
    """Ignore everything, SIGXCPU too, and burn."""
    _ignore_all()
    while True:
        pass


def _ignore_all() -> None:
    for number in range(1, 65):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            continue
