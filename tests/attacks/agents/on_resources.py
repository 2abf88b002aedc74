"""Attacks 50-58 and 69-74: exhaustion, hostile results, and ways to the next rollout.

All of it is bounded: where nothing stops an attack, it ends by itself before it hurts the machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from functools import partial
from typing import Any

from calls import UDP_LITE, Attempt, Refused, attempt, call, forked, raw_call
from on_processes import siblings_folders

RESULT_FD = 3
MIB = 2**20
HOLD_S = 1.5
"""Longer than limits that are polled take to notice."""
MADV_DONTNEED = 4


def a50(data: dict[str, Any]) -> str:
    def as_mapping() -> None:
        mmap.mmap(-1, 5 * 2**30)

    return attempt(("bytes", lambda: len(bytearray(5 * 2**30))), ("mmap", as_mapping))


def _hold(num_processes: int, take: Any) -> str:
    """Each process takes its part and holds it; "SUCCEEDED" if all of them could."""
    reader, writer = os.pipe()
    for _ in range(num_processes):

        def part() -> None:
            kept = take()
            os.write(writer, b"x" if kept else b"-")
            time.sleep(HOLD_S)

        forked(part)
    os.close(writer)
    taken = b""
    while len(taken) < num_processes:
        part_of_it = os.read(reader, num_processes)
        if not part_of_it:
            return f"stopped: {len(taken)} of {num_processes} processes got their part"
        taken += part_of_it
    if b"-" in taken:
        return f"stopped: {taken.count(b'x')} of {num_processes} processes got their part"
    time.sleep(HOLD_S)
    return f"SUCCEEDED: {num_processes} processes hold {{}} MiB together"


def a51a(data: dict[str, Any]) -> str:
    """Processes that are each below the limit of one: private memory."""
    return _hold(6, lambda: bytearray(b"x" * (50 * MIB))).format(300)


def a51b(data: dict[str, Any]) -> str:
    """The same in shared memory, which no process has in its table of pages any more."""

    def take() -> object:
        region = mmap.mmap(-1, 50 * MIB, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        for at in range(0, len(region), 4096):
            region[at] = 1
        region.madvise(MADV_DONTNEED)
        return region

    return _hold(6, take).format(300)


def a51c(data: dict[str, Any]) -> str:
    """The same in the buffers of sockets, which are the kernel's."""

    def take() -> object:
        pairs, held = [], 0
        while held < 30 * MIB:
            try:
                near, far = socket.socketpair()
            except OSError:
                break
            pairs.append((near, far))
            for end in (near, far):
                end.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        held += end.send(b"x" * 65536)
        return pairs if held >= 30 * MIB else None

    return _hold(6, take).format(180)


def a51d(data: dict[str, Any]) -> str:
    """The same in the buffers of TCP connections."""

    def take() -> object:
        kept, held = [], 0
        try:
            listener = socket.create_server(("127.0.0.1", 0), backlog=64)
            while held < 30 * MIB and len(kept) < 60:
                near = socket.create_connection(listener.getsockname())
                far, _ = listener.accept()
                kept.append((near, far))
                for end in (near, far):
                    end.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        while True:
                            held += end.send(b"x" * 65536)
        except OSError:
            return None
        return kept if held >= 30 * MIB else None

    return _hold(6, take).format(180)


def a51e(data: dict[str, Any]) -> str:
    """The same in a table of futexes, which the kernel makes as large as it is asked to."""
    set_slots = 1
    return attempt(("PR_FUTEX_HASH", lambda: call("prctl", 78, set_slots, 2**16, 0, 0)))


def a51f(data: dict[str, Any]) -> str:
    """Memory of the kernel's for each file and mapping, which is in no account, and the machine's
    own huge pages."""
    at_cwd, set_vma, anonymous_name = -100, 0x53564D41, 0
    entry = struct.Struct("=HHI")
    user_obj, user, group_obj, mask, other, nobody = 1, 2, 4, 16, 32, 2**32 - 1
    entries = [(user_obj, 7, nobody), *[(user, 7, os.getuid())] * 8000]
    entries += [(group_obj, 7, nobody), (mask, 7, nobody), (other, 7, nobody)]
    access = struct.pack("=I", 2) + b"".join(entry.pack(*each) for each in entries)
    mapped = mmap.mmap(-1, 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    arguments = (ctypes.c_uint64 * 2)()
    # Of a size that there is none of: a refusal has to come before it is looked at.
    huge = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000 | 1 << 26
    return attempt(
        ("access list", lambda: os.setxattr(".", "system.posix_acl_access", access)),
        ("by setxattrat", lambda: raw_call(463, at_cwd, b".", 0, b"user.x", arguments, 16)),
        ("name", lambda: call("prctl", set_vma, anonymous_name, address, 4096, b"attack")),
        ("huge pages", lambda: call("mmap", 0, 2 * MIB, 3, huge, -1, 0)),
    )


def a51g(data: dict[str, Any]) -> str:
    """Memory of the kernel's for each socket, which is in no account: datagrams that are never
    sent, headers, groups, errors and copies that nobody takes."""
    more, udp, udp_cork = 0x8000, 17, 1
    ip, ipv6, index = 0, 41, struct.pack("@I", 1)
    family = socket.AF_INET6 if os.path.exists("/proc/self/net/if_inet6") else socket.AF_INET
    try:
        client = socket.socket(family, socket.SOCK_DGRAM)
    except PermissionError:
        client = socket.socket(family, socket.SOCK_STREAM)
    group = socket.inet_pton(socket.AF_INET6, "ff02::1234") + index
    header = struct.pack("@QIIi4x", 20, ipv6, 67, 0)  # IPV6_TCLASS, as a control message
    address = ("::1", 9) if family == socket.AF_INET6 else ("127.0.0.1", 9)
    return attempt(
        ("MSG_MORE", lambda: client.sendto(b"x", more, address)),
        ("UDP_CORK", lambda: client.setsockopt(udp, udp_cork, 1)),
        ("UDP_CORK of UDP-Lite", lambda: client.setsockopt(UDP_LITE, udp_cork, 1)),
        ("IPV6_2292PKTOPTIONS", lambda: client.setsockopt(ipv6, 6, header * 1000)),
        ("IPV6_ADD_MEMBERSHIP", lambda: client.setsockopt(ipv6, 20, group)),
        ("IP_ADD_MEMBERSHIP", lambda: client.setsockopt(ip, 35, b"\xe0\0\1\1" + b"\x7f\0\0\1")),
        ("IPV6_RECVERR", lambda: client.setsockopt(ipv6, 25, 1)),
        ("IP_RECVERR", lambda: client.setsockopt(ip, 11, 1)),
        ("SO_TIMESTAMPING", lambda: client.setsockopt(socket.SOL_SOCKET, 37, 2)),
        ("SO_ZEROCOPY", lambda: client.setsockopt(socket.SOL_SOCKET, 60, 1)),
    )


def _left_listening(host: str) -> socket.socket:
    listener = socket.socket()
    LEFT.append(listener)
    listener.bind((host, 0))
    listener.listen(4096)
    return listener


def a51h(data: dict[str, Any]) -> str:
    """Connections that nobody accepts: their makers have closed them, and no descriptor is left."""
    num = 0
    for number in range(32):
        try:
            listener = _left_listening(f"127.0.1.{number + 1}")
        except OSError as error:
            return f"stopped: {errno.errorcode[error.errno or 0]}"
        for _ in range(4000):
            with socket.socket() as client:
                client.setblocking(False)
                client.connect_ex(listener.getsockname())
            num += 1
    time.sleep(HOLD_S)
    return f"SUCCEEDED: {num} connections, of 4 KB each"


def a51j(data: dict[str, Any]) -> str:
    """Connections that both ends have closed, and one had not read: the kernel ends them, and has
    room for so many of all the machine's."""
    for number in range(3):
        try:
            listener = _left_listening(f"127.0.2.{number + 1}")
        except OSError as error:
            return f"stopped: {errno.errorcode[error.errno or 0]}"
        for _ in range(4000):
            with socket.socket() as client:
                client.connect(listener.getsockname())
                client.setblocking(False)
                client.send(bytes(6000))
    time.sleep(HOLD_S)
    return "SUCCEEDED: 12000 of them"


def a51i(data: dict[str, Any]) -> str:
    """Locks of single bytes of a file."""
    set_lock = struct.Struct("@hhqqi4x")
    with open("locked", "wb") as file:
        for at in range(0, 20_000, 2):
            fcntl.fcntl(file, fcntl.F_SETLK, set_lock.pack(fcntl.F_WRLCK, 0, at, 1, 0))
    return "SUCCEEDED: 10000 locks"


def a52(data: dict[str, Any]) -> str:
    """Memory in files without a path, and in /dev/shm."""

    def in_shm() -> str:
        for number in range(20):
            with open(f"/dev/shm/attack-{number}", "wb", buffering=0) as file:
                for _ in range(2):
                    file.write(b"x" * MIB)
        return "40 MiB"

    def large() -> str:
        with open("/dev/shm/attack", "wb", buffering=0) as file:
            for _ in range(40):
                file.write(b"x" * MIB)
        return "40 MiB"

    return attempt(
        ("memfd_create", lambda: call("memfd_create", b"attack", 0)),
        ("memfd_secret", lambda: call("memfd_secret", 0)),
        ("one file", large),
        ("many files", in_shm),
    )


def _burn(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def _serially(fork: Any) -> str:
    """Children one after the other, each well below the limit of one process: 1.5 s of CPU."""
    for _ in range(6):
        reader, writer = os.pipe()
        pid = fork()
        if pid == 0:
            _burn(0.25)
            os._exit(0)
        os.close(writer)
        os.read(reader, 1)  # its end
        os.close(reader)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
    time.sleep(HOLD_S / 2)
    return "SUCCEEDED: 1.5 s of CPU in six processes"


def a53a(data: dict[str, Any]) -> str:
    return _serially(os.fork)


def a53b(data: dict[str, Any]) -> str:
    """The kernel adds no time of children that their parent does not wait for."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    return _serially(os.fork)


def a53c(data: dict[str, Any]) -> str:
    """Children of the parent: their time is not this child's."""
    clone_parent = 0x8000
    try:
        return _serially(lambda: call("clone", clone_parent | signal.SIGCHLD, 0, 0, 0, 0))
    except OSError as error:
        return f"stopped: {errno.errorcode[error.errno or 0]}"


def a55a(data: dict[str, Any]) -> str:
    """One endless line, to stdout or stderr."""
    while True:
        os.write(data["fd"], b"x" * 65536)


def a55b(data: dict[str, Any]) -> str:
    """Words for the terminal of whoever reads them."""
    for stream in (sys.stdout, sys.stderr):
        stream.write("\x1b]0;title\x07\x1b[31mred\x1b[2J\r\u202etxt.exe\u2028\x9b0m")
    raise ValueError("\x1b[31m\r\u202e")


RESULTS = {
    "huge": b'{"ok": "' + b"x" * MIB + b'"}',
    "deep": b'{"ok": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    "duplicate": b'{"ok": 1, "ok": 2}',
    "nan": b'{"ok": NaN}',
    "infinite": b'{"ok": 1e999}',
    "digits": b'{"ok": ' + b"9" * 20_000 + b"}",
    "pickle": b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93.",
    "bytes": bytes(range(256)),
    "surrogate": b'{"ok": "\\ud800"}',
}


def a55c(data: dict[str, Any]) -> str:
    """Each byte of the output in a packet of its own: it takes a read of whoever reads it."""

    def turn() -> str:
        fcntl.fcntl(1, fcntl.F_SETFL, os.O_WRONLY | os.O_DIRECT)
        return "turned"

    def reopen() -> str:
        return f"opened as {os.open('/proc/self/fd/1', os.O_WRONLY | os.O_DIRECT)}"

    return attempt(("F_SETFL", turn), ("open", reopen))


def a56(data: dict[str, Any]) -> None:
    """A result message of one's own."""
    view = memoryview(RESULTS[data["result"]])
    while view:
        view = view[os.write(RESULT_FD, view) :]
    os._exit(0)


def a57(data: dict[str, Any]) -> str:
    """A grandchild that keeps the result pipe, and the others, open."""

    def stay() -> None:
        os.setsid()
        time.sleep(600)

    forked(stay)
    return "left"


def a58(data: dict[str, Any]) -> str:
    def exhaust() -> str:
        fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(2000)]
        return f"{len(fds)} descriptors"

    def in_flight() -> str:
        """Descriptors that wait in a socket count for no process's limit, but for their own."""
        near, far = socket.socketpair()
        near.setblocking(False)
        for _ in range(100):
            fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(100)]
            socket.send_fds(near, [b"x"], fds)
            for fd in fds:
                os.close(fd)
        return f"10000 descriptors in flight to {far.fileno()}"

    try:
        opened = attempt(("open", exhaust))
    finally:
        os.closerange(4, 4096)
    return opened if opened.startswith("SUCCEEDED") else f"{opened}, {_bounded(in_flight)}"


def a58b(data: dict[str, Any]) -> str:
    """As many descriptors in flight as there can be: they count for the user, whose other processes
    may then pass none."""
    near, far = socket.socketpair()
    near.setblocking(False)
    try:
        while True:
            fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(100)]
            try:
                socket.send_fds(near, [b"x"], fds)
            finally:
                for fd in fds:
                    os.close(fd)
    except OSError as error:
        reason = errno.errorcode[error.errno or 0]
    time.sleep(2 * HOLD_S)
    far.close()
    return f"stopped: {reason}"


def a58c(data: dict[str, Any]) -> str:
    """Timers, each of which counts as a queued signal of the user's."""

    def flood() -> str:
        for _ in range(4000):
            call("timer_create", 1, None, (ctypes.c_int * 1)())
        return "4000 timers"

    return attempt(("timer_create", flood))


def a58d(data: dict[str, Any]) -> str:
    """The pages that a user's pipes may have together: others are given two from then on."""
    set_size, get_size = 1031, 1032
    pipes = []
    for _ in range(120):
        pipes.append(os.pipe())
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipes[-1][1], set_size, MIB)
    size = fcntl.fcntl(os.pipe()[1], get_size)
    return f"SUCCEEDED: {size}" if size < 65536 else f"stopped: a new pipe has {size} bytes"


def _bounded(act: Any) -> str:
    return attempt(("in flight", act)).removeprefix("stopped: ")


TRAPS = {
    "sitecustomize.py": "print('TRAPPED')\n",
    "usercustomize.py": "print('TRAPPED')\n",
    "trap.pth": "import sys; print('TRAPPED')\n",
    "trap.cjs": "console.log('TRAPPED')\n",
    ".npmrc": "node-options=--require ./trap.cjs\n",
    ".bashrc": "echo TRAPPED\n",
    ".profile": "echo TRAPPED\n",
}


def a70(data: dict[str, Any]) -> str:
    """Poison for interpreters of the next child; or, as the next, whether any of it works."""
    site = f".local/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    home = os.environ["HOME"]
    folders = [os.getcwd(), home, os.environ["TMPDIR"], os.path.join(home, site), *sys.path]
    if data["part"] == "next":
        outputs = []
        for argv in ([sys.executable, "-c", "pass"], ["/bin/bash", "-ic", "true"]):
            with contextlib.suppress(FileNotFoundError):
                outputs.append(subprocess.run(argv, capture_output=True, text=True).stdout)
        told = {
            name: os.environ[name] for name in ("NODE_OPTIONS", "BASH_ENV") if name in os.environ
        }
        trapped = [output for output in outputs if "TRAPPED" in output]
        return f"SUCCEEDED: {trapped} {told}" if trapped or told else "stopped: absent"
    os.makedirs(os.path.join(home, site), exist_ok=True)
    os.environ.update(NODE_OPTIONS="--require ./trap.cjs", PYTHONSTARTUP="x", BASH_ENV=".bashrc")
    for folder in folders:
        for name, content in TRAPS.items():
            with contextlib.suppress(OSError), open(os.path.join(folder, name), "w") as file:
                file.write(content)
    return "left"


def a71a(data: dict[str, Any]) -> str:
    """Write to what the next rollout runs: the interpreter's files, the zygote's memory."""
    parent = os.getppid() or 1
    attempts: list[Attempt] = []
    for folder in [sys.prefix, *sys.path, os.path.dirname(os.__file__)]:
        if os.path.isdir(folder):
            path = os.path.join(folder, "attack.py")
            attempts.append(("a module", partial(open, path, "w")))
    for path in (os.__file__, sys.executable, __file__):
        attempts.append(("replace one", partial(open, path, "r+b")))
    attempts += [
        ("its memory", lambda: open(f"/proc/{parent}/mem", "r+b").close()),
        ("the program's text", _write_own_text),
    ]
    return attempt(*attempts)


def _write_own_text() -> str:
    """/proc/self/mem writes to pages that are mapped read-only: the file must not change."""
    with open(os.__file__, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 16, mmap.MAP_PRIVATE, mmap.PROT_READ)
        before = file.read(16)
    with open("/proc/self/maps") as maps:
        line = next(line for line in maps if os.__file__ in line)
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(int(line.split("-")[0], 16))
        memory.write(b"#" * 16)
    with open(os.__file__, "rb") as file:
        if file.read(16) != before:
            return "changed the file"
    raise Refused("a copy" if mapped[:1] == b"#" else "nothing")


def a71c(data: dict[str, Any]) -> str:
    """Read and write the files of siblings, and of the zygote."""
    attempts: list[Attempt] = []
    for folder in siblings_folders():
        attempts += [
            ("list", partial(os.listdir, folder)),
            ("write", partial(open, os.path.join(folder, "attack"), "w")),
            ("remove", partial(os.rmdir, os.path.join(folder, "..", "tmp"))),
        ]
    home = os.path.join(os.getcwd(), "..", "..", "zygote")
    attempts += [
        ("the zygote's", partial(os.listdir, home)),
        ("write the zygote's", partial(open, os.path.join(home, "attack"), "w")),
    ]
    return attempt(*attempts)


SHARED: list[mmap.mmap] = []
LEFT: list[socket.socket] = []


def a71b(data: dict[str, Any]) -> str:
    """Memory that the import made, shared: what one child writes the next one reads."""
    (region,) = SHARED
    if data["part"] == "writer":
        region[:5] = b"hello"
        return "left"
    seen = region[:5]
    return "stopped: nothing there" if seen == b"\0" * 5 else f"SUCCEEDED: read {seen!r}"


def a71d(data: dict[str, Any]) -> str:
    """A door to this child's files, for a helper of the import's: see `import_attacks`."""
    (region,) = SHARED
    if data["part"] == "writer":
        with open("kept", "wb") as file:
            file.write(b"x" * 2**20)
        doors = [os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name in ("user", "mnt")]
        socket.send_fds(LEFT[0], [b"doors"], doors)
        return "left"
    for _ in range(100):
        if said := region[8:].rstrip(b"\0").decode():
            return said
        time.sleep(0.1)
    return "the helper said nothing"


def a71e(data: dict[str, Any]) -> str:
    """A descriptor of one of this child's files, in a socket of the import's."""
    if data["part"] == "writer":
        with open("kept", "wb+") as file:
            file.write(b"x" * 2**20)
            socket.send_fds(LEFT[0], [b"file"], [file.fileno()])
        return "left"
    _, (fd,), _, _ = socket.recv_fds(LEFT[1], 16, 1)
    return f"SUCCEEDED: {os.fstat(fd).st_size} bytes"


def a69b(data: dict[str, Any]) -> str:
    """Whether the limits hold that the import's code has torn out, see `import_attacks`."""

    def many() -> str:
        return f"{len([os.open('/dev/null', os.O_RDONLY) for _ in range(400)])} descriptors"

    return attempt(("open files", many), ("address space", _gibibyte))


def _gibibyte() -> str:
    """Twice what a process may have; of the host's memory it takes nothing."""
    mmap.mmap(-1, 2**30, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    return "1 GiB"


def a69c(data: dict[str, Any]) -> str:
    return attempt(("address space", _gibibyte))


def undisturbed(data: dict[str, Any]) -> str:
    """Not an attack: a sibling that waits for a word, and then does what children do."""
    keep = bytearray(os.urandom(64)) * 1000
    before = ctypes.string_at(bytes(keep), 64)
    with socket.create_connection(("127.0.0.1", data["port"]), timeout=60) as door:
        door.sendall(b"up")
        door.recv(1)
    with open("file", "w") as file:
        file.write("content")
    with open("file") as file:
        same = file.read() == "content" and bytes(keep[:64]) == before
    _, status = os.waitpid(forked(lambda: None), 0)
    return "undisturbed" if same and status == 0 else "disturbed"
