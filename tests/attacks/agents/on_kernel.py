"""Attacks 33-48: the kernel's attics, and the network."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import signal
import socket
import struct
from functools import partial
from typing import Any

from calls import UDP_LITE, Attempt, Refused, attempt, call, calls, forked, raw_call

MAX_INOTIFY = 300
TIMEOUT_S = 2.0
MSG_FASTOPEN, TCP_FASTOPEN_CONNECT, TCP_ULP = 0x20000000, 30, 31


def a33(data: dict[str, Any]) -> str:
    parameters = (ctypes.c_uint32 * 30)()
    return calls(
        ("io_uring_setup", 4, parameters),
        ("io_uring_enter", 0, 0, 0, 0, None, 0),
        ("io_uring_register", 0, 0, None, 0),
    )


def a33b(data: dict[str, Any]) -> str:
    """Calls that are newer than this list."""
    numbers = (*range(470, 500), 1000)
    return attempt(*((f"{number}", partial(raw_call, number)) for number in numbers))


def a33c(data: dict[str, Any]) -> str:
    """The old AIO: more of its events than the machine has left."""
    context = (ctypes.c_ulong * 1)(0)
    return calls(
        ("io_setup", 60_000, context),
        ("io_setup", 1, context),
        ("io_submit", 0, 0, None),
        ("io_getevents", 0, 0, 0, None, None),
    )


def a34(data: dict[str, Any]) -> str:
    hardware = (ctypes.c_uint32 * 32)(0, 128)
    software = (ctypes.c_uint32 * 32)(1, 128)  # type, size
    map_attributes = (ctypes.c_uint32 * 32)(2, 4, 4, 1)  # an array of one entry
    take_all = (ctypes.c_uint64 * 1)(0x0000FFFF00000006)  # ret 65535
    program = struct.pack("HxxxxxxQ", 1, ctypes.addressof(take_all))

    def attach(option: int) -> None:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, option, program)

    options = {"a filter": 26, "a program": 50, "for a port": 51, "a program for a port": 52}
    return attempt(
        ("bpf", lambda: call("bpf", 0, map_attributes, 128)),
        ("perf", lambda: call("perf_event_open", software, 0, -1, -1, 0)),
        ("perf, hardware", lambda: call("perf_event_open", hardware, 0, -1, -1, 0)),
        *((name, lambda option=option: attach(option)) for name, option in options.items()),
    )


def a35(data: dict[str, Any]) -> str:
    user_mode_only = 1
    return attempt(
        ("userfaultfd", lambda: call("userfaultfd", os.O_CLOEXEC)),
        ("user mode", lambda: call("userfaultfd", os.O_CLOEXEC | user_mode_only)),
        ("its device", lambda: os.open("/dev/userfaultfd", os.O_RDWR)),
    )


def a36(data: dict[str, Any]) -> str:
    session, get_id = -3, 0
    return calls(
        ("add_key", b"user", b"attack", b"x", 1, session),
        ("request_key", b"user", b"attack", None, session),
        ("keyctl", get_id, session, 1, 0, 0),
    )


def a37(data: dict[str, Any]) -> str:
    """With arguments that do nothing even where they are let through."""
    return calls(
        ("kexec_load", 0, 0, None, 0),
        ("kexec_file_load", -1, -1, 0, None, 0),
        ("init_module", None, 0, b""),
        ("finit_module", -1, b"", 0),
        ("delete_module", b"no_such_module", os.O_NONBLOCK),
        ("reboot", 0, 0, 0, None),
        ("swapon", b"/nonexistent", 0),
        ("swapoff", b"/nonexistent"),
    )


def a38(data: dict[str, Any]) -> str:
    no_randomization, read_implies_exec = 0x0040000, 0x0400000
    return calls(
        ("personality", no_randomization),
        ("personality", read_implies_exec),
        ("modify_ldt", 1, (ctypes.c_uint32 * 4)(), 16),
        ("iopl", 3),
        ("ioperm", 0x80, 1, 1),
    )


def a38b(data: dict[str, Any]) -> str:
    """What Linux 6.8 and later let a process ask, and set, of security modules."""
    return calls(
        ("lsm_list_modules", None, None, 0),
        ("lsm_get_self_attr", 100, None, None, 0),
        ("lsm_set_self_attr", 100, None, 0, 0),
    )


def a39(data: dict[str, Any]) -> str:
    """With times that no clock takes: a refusal has to come before they are looked at."""
    never = (ctypes.c_int64 * 2)(0, -1)
    timex = (ctypes.c_int64 * 32)(-1)
    return calls(
        ("settimeofday", never, None),
        ("clock_settime", 0, never),
        ("adjtimex", timex),
        ("clock_adjtime", 0, timex),
    )


def a39b(data: dict[str, Any]) -> str:
    """Have the machine write all that anybody has written."""
    root = os.open("/usr", os.O_RDONLY)

    def flush(name: str, *more: int) -> str:
        """Of one file: who can read it may ask, and the disk writes what it holds itself."""
        try:
            call(name, -1, *more)
        except OSError:  # the kernel has looked
            call(name, root, *more)
            return "done"
        raise Refused("only seems to be done")

    btrfs_sync = 0x9408
    return attempt(
        ("sync", lambda: call("sync")),
        ("syncfs", lambda: call("syncfs", root)),
        ("BTRFS_IOC_SYNC", lambda: call("ioctl", root, btrfs_sync, None)),
        ("fsync", lambda: flush("fsync")),
        ("fdatasync", lambda: flush("fdatasync")),
        ("sync_file_range", lambda: flush("sync_file_range", 0, 0, 7)),
    )


def a40(data: dict[str, Any]) -> str:
    """Type into a terminal: also with bits that the kernel does not look at."""
    push_input, linux = 0x5412, 0x541C
    attempts: list[Attempt] = []
    for fd in range(3):
        for request in (push_input, linux, push_input | 2**32):
            attempts.append((f"{request:#x}", partial(call, "ioctl", fd, request, b"x")))

    def on_terminal(path: str) -> None:
        call("ioctl", os.open(path, os.O_RDWR), push_input, b"x")

    return attempt(
        *attempts,
        ("/dev/tty", lambda: on_terminal("/dev/tty")),
        ("/dev/ptmx", lambda: on_terminal("/dev/ptmx")),
        ("/dev/console", lambda: on_terminal("/dev/console")),
    )


def a41(data: dict[str, Any]) -> str:
    private, create = 0, 0o1600
    return calls(
        ("shmget", private, 4096, create),
        ("semget", private, 1, create),
        ("msgget", private, create),
        ("mq_open", b"attack", os.O_RDWR | os.O_CREAT, 0o600, None),
    )


def a41b(data: dict[str, Any]) -> str:
    """Those of others, whose numbers are small: ask about them, read, write, take, destroy."""
    shm_stat, msg_stat, sem_stat, room = 13, 11, 18, ctypes.create_string_buffer(4096)
    return calls(
        ("shmctl", 0, shm_stat, room),
        ("shmat", 0, None, 0),
        ("msgctl", 0, msg_stat, room),
        ("msgrcv", 0, room, 1024, 0, 0o4000),
        ("msgsnd", 0, room, 8, 0o4000),
        ("semctl", 0, 0, sem_stat, room),
        ("semop", 0, room, 1),
        ("semtimedop", 0, room, 1, None),
        ("mq_unlink", b"attack"),
        ("mq_timedreceive", 0, room, 1024, None, None),
        ("mq_timedsend", 0, room, 8, 0, None),
    )


def a42(data: dict[str, Any]) -> str:
    def flood() -> str:
        for _ in range(MAX_INOTIFY):
            call("inotify_init1", 0)
        return f"{MAX_INOTIFY} of them"

    return attempt(
        ("fanotify", lambda: call("fanotify_init", 0, os.O_RDONLY)),
        ("fanotify, unprivileged", lambda: call("fanotify_init", 0x200, os.O_RDONLY)),
        ("inotify", flood),
    )


def a43(data: dict[str, Any]) -> str:
    """A core dump, or one that the host's own program for them is started with: that takes any
    limit but 1 (core(5))."""

    def crash() -> None:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGSEGV)

    def change_limit(to: int) -> str:
        call("prlimit64", 0, resource.RLIMIT_CORE, (ctypes.c_uint64 * 2)(to, to), None)
        resource.setrlimit(resource.RLIMIT_CORE, (to, to))
        if (limit := resource.getrlimit(resource.RLIMIT_CORE)) == (1, 1):
            raise Refused("it stays")
        return f"RLIMIT_CORE is {limit}"

    def dump() -> str:
        _, status = os.waitpid(forked(crash), 0)
        cores = [name for name in os.listdir(".") if name.startswith("core")]
        if os.WCOREDUMP(status) or cores:
            return f"dumped {cores}"
        raise Refused("no core")

    return attempt(
        ("raise the limit", lambda: change_limit(2**20)),
        ("lower the limit", lambda: change_limit(0)),
        ("crash", dump),
    )


def _connect(address: tuple[str, int], family: int = socket.AF_INET) -> str:
    with socket.socket(family, socket.SOCK_STREAM) as client:
        client.settimeout(TIMEOUT_S)
        client.connect(address)
    return f"connected to {address}"


def _datagram(address: tuple[str, int]) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(TIMEOUT_S)
        client.connect(address)
        client.send(b"attack")
        return f"answered {client.recv(16)!r}"  # the host's listener echoes


def a44a(data: dict[str, Any]) -> str:
    """The host's own ports."""
    return attempt(
        ("TCP", lambda: _connect(("127.0.0.1", data["tcp"]))),
        ("TCP, 0.0.0.0", lambda: _connect(("0.0.0.0", data["tcp"]))),
        ("TCP, mapped", lambda: _connect(("::ffff:127.0.0.1", data["tcp"]), socket.AF_INET6)),
        ("UDP", lambda: _datagram(("127.0.0.1", data["udp"]))),
    )


def a44b(data: dict[str, Any]) -> str:
    """The port that leads out, at another address."""
    return attempt(("TCP", lambda: _connect(("127.0.0.2", data["port"]))))


def a45(data: dict[str, Any]) -> str:
    """Everything beyond this machine."""

    def resolve() -> str:
        try:
            return str(socket.getaddrinfo("example.com", 80)[0][4])
        except socket.gaierror:
            raise Refused("unknown") from None

    def icmp(kind: int) -> None:
        socket.socket(socket.AF_INET, kind, socket.IPPROTO_ICMP).close()

    return attempt(
        ("metadata", lambda: _connect(("169.254.169.254", 80))),
        ("private", lambda: _connect(("10.0.0.1", 443))),
        ("public", lambda: _connect(("192.0.2.1", 443))),
        ("IPv6", lambda: _connect(("2001:db8::1", 443), socket.AF_INET6)),
        ("DNS", lambda: _datagram(("192.0.2.1", 53))),
        ("a name", resolve),
        ("ping", lambda: icmp(socket.SOCK_DGRAM)),
        ("raw ICMP", lambda: icmp(socket.SOCK_RAW)),
    )


def _unix(address: str, kind: int = socket.SOCK_STREAM) -> str:
    with socket.socket(socket.AF_UNIX, kind) as client:
        client.settimeout(TIMEOUT_S)
        client.connect(address)
    return f"connected to {address!r}"


def a46a(data: dict[str, Any]) -> str:
    """The host's abstract Unix sockets."""
    name = "\0" + data["abstract"]
    return attempt(
        ("stream", lambda: _unix(name)),
        ("datagram", lambda: _unix(name + "-datagram", socket.SOCK_DGRAM)),
    )


def a46b(data: dict[str, Any]) -> str:
    """The host's Unix sockets with a path that cannot be read."""

    def without_socket() -> str:
        near, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        near.sendto(b"attack", data["home_socket"] + "-datagram")
        return "sent from a socket pair"

    return attempt(
        ("stream", lambda: _unix(data["home_socket"])),
        ("datagram", lambda: _unix(data["home_socket"] + "-datagram", socket.SOCK_DGRAM)),
        ("socketpair", without_socket),
    )


def a46c(data: dict[str, Any]) -> str:
    """The host's Unix sockets in a folder that can be read."""
    return attempt(("stream", lambda: _unix(data["project_socket"])))


def a46d(data: dict[str, Any]) -> str:
    """From a pair of Unix sockets to those of the host: connect and send, whatever the kind."""
    raw = socket.SOCK_RAW  # to the kernel the same as a datagram
    datagrams = (socket.SOCK_DGRAM, raw)
    targets = (data["home_socket"], "\0" + data["abstract"])

    def turn(kind: int, target: str, *, hang_up: bool) -> str:
        near, far = socket.socketpair(socket.AF_UNIX, kind)
        near.settimeout(TIMEOUT_S)
        if hang_up:
            far.close()
        near.connect(target)
        return f"connected to {target!r}"

    def send(kind: int, target: str) -> str:
        near, _ = socket.socketpair(socket.AF_UNIX, kind)
        return f"sent {near.sendto(b'attack', target)} bytes to {target!r}"

    attempts: list[Attempt] = []
    for target in targets:
        attempts += [(f"send {kind}", partial(send, kind, target + "-datagram"))
                     for kind in datagrams]  # fmt: skip
        of_kind = [(socket.SOCK_STREAM, target), (socket.SOCK_SEQPACKET, target + "-packets")]
        for kind, to in (*of_kind, *((kind, target + "-datagram") for kind in datagrams)):
            for hang_up in (False, True):
                attempts.append((f"connect {kind}", partial(turn, kind, to, hang_up=hang_up)))
    return attempt(*attempts)


def _sockets(*kinds: tuple[int, int, int]) -> str:
    attempts: list[Attempt] = []
    for family, kind, protocol in kinds:
        arguments = family, kind, protocol
        attempts.append((f"{arguments}", partial(socket.socket, *arguments)))
    return attempt(*attempts)


def a47a(data: dict[str, Any]) -> str:
    """Families that a network namespace does not confine, or that have a history."""
    raw, stream, datagram, sequential = 3, 1, 2, 5
    netlink = [(16, raw, protocol) for protocol in (0, 6, 12, 15, 16)]
    packet = [(17, raw, 0x0300), (17, datagram, 0)]
    vsock = [(40, stream, 0), (40, datagram, 0), (40, sequential, 0)]
    others = [(family, raw, 0) for family in (38, 44, 15, 29, 31, 42)]
    rare = [(30, sequential, 0), (43, stream, 0), (41, datagram, 0), (21, sequential, 0)]
    internet = [(2, raw, 255), (10, raw, 58), (2, raw, 1), (2, stream, 256), (2, datagram, 136)]
    return _sockets(*netlink, *packet, *vsock, *others, *rare, *internet)


def a47b(data: dict[str, Any]) -> str:
    """Raw sockets, SCTP and DCCP by their type alone, what is no protocol of its type."""
    raw, sequential, dccp, rdm = 3, 5, 6, 4
    kinds = [(family, kind, 0) for family in (2, 10) for kind in (raw, sequential, dccp, rdm)]
    stream, datagram, tcp, udp = 1, 2, 6, 17  # of the wrong kind: looked for, each time
    mixed = [(family, *pair) for family in (2, 10) for pair in ((stream, udp), (datagram, tcp))]
    return _sockets(*kinds, (2, raw, 6), (2, raw, 17), *mixed)


def a48a(data: dict[str, Any]) -> str:
    """Past a rule for TCP ports: Multipath TCP, and fast open, which connects without connect."""
    target = ("127.0.0.1", data["tcp"])

    def multipath() -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262) as client:
            client.settimeout(TIMEOUT_S)
            client.connect(target)
        return "connected"

    def fast(send: Any) -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.settimeout(TIMEOUT_S)
            return f"sent {send(client)} bytes"

    def option(client: socket.socket) -> int:
        client.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
        client.connect(target)
        return client.send(b"attack")

    def many(client: socket.socket) -> int:
        return call("sendmmsg", client.fileno(), (ctypes.c_uint64 * 16)(), 1, MSG_FASTOPEN)

    return attempt(
        ("Multipath TCP", multipath),
        ("sendto", lambda: fast(lambda client: client.sendto(b"attack", MSG_FASTOPEN, target))),
        (
            "sendmsg",
            lambda: fast(lambda client: client.sendmsg([b"attack"], [], MSG_FASTOPEN, target)),
        ),
        ("sendmmsg", lambda: fast(many)),
        ("TCP_FASTOPEN_CONNECT", lambda: fast(option)),
    )


def a47h(data: dict[str, Any]) -> str:
    """What the kernel loads a module for before it looks who asks."""
    codes = {
        "SIOCGIFBR": 0x8940,
        "SIOCSIFBR": 0x8941,
        "SIOCBRADDBR": 0x89A0,
        "SIOCBRDELBR": 0x89A1,
        "SIOCGIFVLAN": 0x8982,
        "SIOCSIFVLAN": 0x8983,
        "SIOCADDDLCI": 0x8980,
        "SIOCDELDLCI": 0x8981,
    }

    return attempt(*((name, partial(_ask, code)) for name, code in codes.items()))


def _ask(code: int) -> None:
    with socket.socket() as client:
        fcntl.ioctl(client, code, bytearray(b"lo".ljust(128, b"\0")))


def a69e(data: dict[str, Any]) -> str:
    """Replace tables of netfilter's, with the rights that `import_attacks` has left to us."""

    def replace(family: int, level: int, option: int) -> None:
        with socket.socket(family) as client:
            client.setsockopt(level, option, bytes(128))

    def ask(family: int, level: int, option: int) -> None:
        with socket.socket(family) as client:
            client.getsockopt(level, option, 84)

    ip, ipv6 = (socket.AF_INET, 0), (socket.AF_INET6, 41)
    wanted = [(*ip, option) for option in (64, 65, 96, 97, 128, 129)] + [(*ipv6, 64), (*ipv6, 65)]
    policies = [(*ip, 16), (*ip, 17), (*ipv6, 34), (*ipv6, 35)]  # of IPsec
    return attempt(
        *((f"{level} {o}", partial(replace, f, level, o)) for f, level, o in wanted + policies),
        *((f"ask {level} {o}", partial(ask, f, level, o)) for f, level, o in wanted),
    )


def a69g(data: dict[str, Any]) -> str:
    """Routes, aliases and settings of devices, with the same rights."""
    codes = {
        "SIOCADDRT": 0x890B,
        "SIOCDELRT": 0x890C,
        "SIOCSIFFLAGS": 0x8914,
        "SIOCSIFADDR": 0x8916,
        "SIOCSIFMTU": 0x8922,
        "SIOCSARP": 0x8955,
        "SIOCGSKNS": 0x894C,
        "SIOCETHTOOL": 0x8946,
    }

    return attempt(*((name, partial(_ask, code)) for name, code in codes.items()))


def a31b(data: dict[str, Any]) -> str:
    """Pages that the kernel makes one with others' of the same content: writing to one tells."""
    mapped = mmap.mmap(-1, 4096)
    pr_set_memory_merge, mergeable = 67, 12
    return attempt(
        ("PR_SET_MEMORY_MERGE", lambda: call("prctl", pr_set_memory_merge, 1, 0, 0, 0)),
        ("MADV_MERGEABLE", lambda: mapped.madvise(mergeable)),
    )


def a48b(data: dict[str, Any]) -> str:
    """A TCP socket turned into something that the rules for TCP do not know."""

    def turn(protocol: bytes) -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.setsockopt(socket.IPPROTO_TCP, TCP_ULP, protocol)
        return protocol.decode()

    def sign(option: int) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as client:
            client.setsockopt(socket.IPPROTO_TCP, option, bytes(256))

    names = (b"smc", b"mptcp", b"tls", b"espintcp")
    signed = {"TCP_MD5SIG": 14, "TCP_MD5SIG_EXT": 32, "TCP_AO_ADD_KEY": 38}
    return attempt(
        *((name.decode(), lambda name=name: turn(name)) for name in names),
        *((name, lambda option=option: sign(option)) for name, option in signed.items()),
    )


def a48d(data: dict[str, Any]) -> str:
    """A UDP socket turned into ESP, into L2TP."""

    def turn(level: int, kind: int) -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.setsockopt(level, 100, kind)  # UDP_ENCAP
        return f"kind {kind}"

    return attempt(
        *(
            (f"level {level}, kind {kind}", partial(turn, level, kind))
            for level in (socket.IPPROTO_UDP, UDP_LITE)
            for kind in (1, 2, 3)
        )
    )


def a48e(data: dict[str, Any]) -> str:
    """What has the kernel rewrite its own code, and stop each processor for it."""

    def switch(level: int, option: int) -> None:
        with _datagram_or_stream() as client:
            client.setsockopt(level, option, 1)

    def ask(code: int) -> None:
        with _datagram_or_stream() as client:
            fcntl.ioctl(client, code, bytearray(64))

    options = {(socket.SOL_SOCKET, option) for option in (29, 35, 63, 64)}  # SO_TIMESTAMP*
    options |= {(level, 104) for level in (socket.IPPROTO_UDP, UDP_LITE)}  # UDP_GRO
    return attempt(
        *((f"option {level} {o}", partial(switch, level, o)) for level, o in sorted(options)),
        # SIOCGSTAMP, SIOCGSTAMPNS, the old and the new
        *((hex(code), partial(ask, code)) for code in (0x8906, 0x8907, 0x80108906, 0x80108907)),
    )


def _datagram_or_stream() -> socket.socket:
    try:
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    except PermissionError:
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM)


def a48c(data: dict[str, Any]) -> str:
    """A port that the kernel picks, where one may not be picked; then wait for somebody outside."""

    def serve() -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.listen()
            listener.settimeout(TIMEOUT_S)
            _, address = listener.accept()
        return f"{address} came in"

    return attempt(("listen", serve))


def a47g(data: dict[str, Any]) -> str:
    """Urgent data on Unix sockets."""
    near, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return attempt(
        ("send", lambda: near.send(b"x", socket.MSG_OOB)),
        ("sendmsg", lambda: near.sendmsg([b"x"], [], socket.MSG_OOB)),
    )


def network_settings(data: dict[str, Any]) -> str:
    """Change the host's network: here to what it is already, which takes the same right."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as control:
        try:
            request = fcntl.ioctl(control, 0x8913, b"lo".ljust(40, b"\0"))  # SIOCGIFFLAGS
            fcntl.ioctl(control, 0x8914, request)  # SIOCSIFFLAGS
        except OSError as error:
            return f"stopped: {errno.errorcode[error.errno or 0]}"
    return "SUCCEEDED: the flags of lo can be set"


a47c = network_settings
