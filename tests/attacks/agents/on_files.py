"""Attacks 1-16: files outside the child's view, and files that hurt whoever handles them later."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from functools import partial
from typing import Any

from calls import Attempt, Refused, attempt, call, calls, forked, read_file

AT_FDCWD = 2**64 - 100
MAX_FILL_BYTES = 40 * 2**20
MIB = b"x" * 2**20


def a01(data: dict[str, Any]) -> str:
    """Read what lies outside."""

    def passwd() -> str:
        with open("/etc/passwd") as file:
            if "root:" not in file.read():
                raise Refused("is the child's own")
        return "users of the host"

    def listing(folder: str) -> str:
        # Folders on the way to what may be read are there, with nothing else in them.
        on_the_way = "/".join([*sys.path, sys.prefix, data["home"], data["project"]]).split("/")
        others = set(os.listdir(folder)) - set(on_the_way)
        if not others:
            raise Refused("is the child's own")
        return str(sorted(others)[:3])

    return attempt(
        ("the host's canary", read_file(data["canary"])),
        ("list the home", lambda: listing(data["home"])),
        ("a hidden folder", read_file(data["hidden"])),
        ("/etc/shadow", read_file("/etc/shadow")),
        ("list /root", lambda: listing("/root")),
        ("list /home", lambda: listing("/home")),
        ("/etc/passwd", passwd),
    )


def a01b(data: dict[str, Any]) -> str:
    return attempt(
        ("a file", read_file(data["hidden_by_name"])),
        ("a folder's", read_file(data["hidden_by_link"])),
    )


def a02(data: dict[str, Any]) -> str:
    """Write, truncate, remove and rename what can be read."""
    attempts: list[Attempt] = []
    for folder in ("/", "/usr", "/usr/bin", "/etc", sys.prefix, data["project"], *sys.path):
        if os.path.isdir(folder):
            new = os.path.join(folder, "attack")
            attempts.append((f"create in {folder}", partial(_create, new)))
            attempts.append((f"mkdir in {folder}", partial(os.mkdir, new)))
    for path in (os.__file__, data["readme"]):
        attempts += [
            (f"write {path}", partial(os.open, path, os.O_WRONLY)),
            (f"truncate {path}", partial(os.truncate, path, 1)),
            (f"rename {path}", partial(os.rename, path, path + ".attack")),
            (f"remove {path}", partial(os.unlink, path)),
        ]
    return attempt(*attempts)


def a03(data: dict[str, Any]) -> str:
    """Ways around: parents of the root, links, descriptors of folders."""
    canary = data["canary"]
    up = "../" * 40

    def by_own_link() -> str:
        os.symlink(canary, "link")
        return read_file("link")()

    def from_descriptor() -> str:
        root = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
        return f"descriptor {os.open(up + canary.lstrip('/'), os.O_RDONLY, dir_fd=root)}"

    return attempt(
        ("../", read_file(up + canary.lstrip("/"))),
        ("/proc/self/root/..", read_file("/proc/self/root/" + up + canary.lstrip("/"))),
        ("/proc/self/cwd/..", read_file("/proc/self/cwd/" + up + canary.lstrip("/"))),
        ("/proc/thread-self/root", read_file("/proc/thread-self/root" + canary)),
        ("a link in the project", read_file(data["link"])),
        ("a link of one's own", by_own_link),
        ("openat", from_descriptor),
    )


def a04(data: dict[str, Any]) -> str:
    """Through /proc of other processes."""
    attempts: list[Attempt] = [("/proc/1/root", read_file("/proc/1/root" + data["canary"]))]
    for pid in (1, os.getppid(), data["victim"], data["guardian"]):
        for name in ("environ", "maps", "mem", "stack"):
            attempts.append((f"{name}", read_file(f"/proc/{pid}/{name}")))
        for name in ("root", "cwd", "exe"):
            attempts.append((name, partial(os.readlink, f"/proc/{pid}/{name}")))
        for fd in range(3):
            attempts.append((f"fd {fd}", read_file(f"/proc/{pid}/fd/{fd}")))
    return attempt(*attempts)


def a04b(data: dict[str, Any]) -> str:
    """Memory and environment of every process that can be seen, siblings and the zygote too."""
    found, reasons = [], set()
    for pid in os.listdir("/proc"):
        if not pid.isdigit() or int(pid) == os.getpid():
            continue
        for name in ("environ", "maps", "mem", "auxv", "stack", "syscall", "smaps_rollup", "io"):
            try:
                with open(f"/proc/{pid}/{name}", "rb") as file:
                    if file.read(64):
                        found.append(f"{name} of {pid}")
            except OSError as error:
                reasons.add(errno.errorcode[error.errno or 0])
        for name in ("root/etc", "cwd/.", "fd/0", "fd/1"):
            try:
                found.append(f"{name} of {pid}: {os.stat(f'/proc/{pid}/{name}').st_ino}")
            except OSError as error:
                reasons.add(errno.errorcode[error.errno or 0])
    if found:
        return f"SUCCEEDED: {found[:5]}"
    return f"stopped: {', '.join(sorted(reasons)) or 'there is nobody'}"


def a05(data: dict[str, Any]) -> str:
    """Mounts and roots, old interface and new."""
    return calls(
        ("mount", b"tmpfs", b".", b"tmpfs", 0, None),
        ("mount", b"/", b".", None, 4096, None),
        ("umount2", b"/proc", 2),
        ("pivot_root", b".", b"."),
        ("chroot", b"."),
        ("fsopen", b"tmpfs", 0),
        ("fspick", AT_FDCWD, b".", 0),
        ("fsconfig", 0, 6, None, None, 0),
        ("fsmount", 0, 0, 0),
        ("open_tree", AT_FDCWD, b"/", 1),
        ("move_mount", AT_FDCWD, b"/", AT_FDCWD, b".", 0),
        ("mount_setattr", AT_FDCWD, b"/", 0, (ctypes.c_uint64 * 4)(0, 1, 0, 0), 32),
        ("open_tree_attr", AT_FDCWD, b"/", 1, (ctypes.c_uint64 * 4)(0, 1, 0, 0), 32),
        ("statmount", (ctypes.c_uint64 * 4)(32, 1, 1), (ctypes.c_uint64 * 64)(), 512, 0),
        ("listmount", (ctypes.c_uint64 * 4)(32, 2**64 - 1), (ctypes.c_uint64 * 8)(), 8, 0),
    )


def a06(data: dict[str, Any]) -> str:
    """A device of one's own, used."""

    def device(kind: int, major: int, minor: int) -> str:
        path = f"device-{major}-{minor}"
        os.mknod(path, kind | 0o600, os.makedev(major, minor))
        fd = os.open(path, os.O_RDONLY)
        return f"opened {path}: {len(os.read(fd, 16))} bytes"

    return attempt(
        ("character device", lambda: device(stat.S_IFCHR, 1, 8)),
        ("memory of the kernel", lambda: device(stat.S_IFCHR, 1, 1)),
        ("block device", lambda: device(stat.S_IFBLK, 254, 0)),
    )


def a06b(data: dict[str, Any]) -> str:
    """Devices that the host may have: each a large part of the kernel."""
    names = ("fuse", "kvm", "net/tun", "vhost-net", "vhost-vsock", "vsock", "loop-control", "ptmx")
    others = ("tty", "tty1", "snd/timer", "dri/card0", "nvidiactl", "uinput", "userfaultfd", "mem")
    attempts: list[Attempt] = [
        (name, partial(os.open, f"/dev/{name}", os.O_RDWR)) for name in (*names, *others)
    ]
    return attempt(*attempts, ("a terminal", os.openpty))


def a07(data: dict[str, Any]) -> str:
    """Hard links of files outside into the work directory."""

    def by_descriptor(path: str, flags: int, as_path: bool) -> None:
        fd = os.open(path, os.O_PATH)
        old = f"/proc/self/fd/{fd}" if as_path else ""
        call("linkat", AT_FDCWD if as_path else fd, old, AT_FDCWD, "linked", flags)

    return attempt(
        ("the canary", lambda: os.link(data["canary"], "linked")),
        ("a program", lambda: os.link("/usr/bin/env", "linked")),
        ("a readable file", lambda: os.link(data["readme"], "linked")),
        ("AT_SYMLINK_FOLLOW", lambda: by_descriptor(data["readme"], 0x400, True)),
        ("AT_EMPTY_PATH", lambda: by_descriptor(data["readme"], 0x1000, False)),
        ("rename", lambda: os.rename(data["readme"], "renamed")),
    )


def _identity(pid: int | str) -> list[str]:
    with open(f"/proc/{pid}/status") as file:
        wanted = ("Uid:", "Gid:", "CapPrm:", "CapEff:")
        return [line.strip() for line in file if line.startswith(wanted)]


def a08(data: dict[str, Any]) -> str:
    """Setuid programs, run; and becoming somebody without them."""
    own = _identity("self")

    def run_setuid() -> str:
        names = ("su", "passwd", "chsh", "newgrp", "mount", "sudo", "pkexec")
        paths = [f"/usr/bin/{name}" for name in names if os.path.exists(f"/usr/bin/{name}")]
        program = next((path for path in paths if os.stat(path).st_mode & stat.S_ISUID), None)
        if program is None:
            raise Refused("no setuid program on this machine")
        reader, writer = os.pipe()
        inside, outside = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.dup2(reader, 0)
            os.dup2(outside, 1)
            os.dup2(outside, 2)
            os.execv(program, [program])
        os.close(outside)
        try:
            deadline = time.monotonic() + 3.0
            while time.monotonic() < deadline:
                with open(f"/proc/{pid}/comm") as file:
                    if file.read().strip() == os.path.basename(program):
                        break
            gained = _identity(pid)
        except (FileNotFoundError, ProcessLookupError):
            raise Refused("it ended at once") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(writer)
            os.close(inside)
        if gained != own:  # nor may a capability that was dropped come back
            return f"{own} became {gained}"
        raise Refused("gains nothing")

    def become() -> str:
        before = os.getresuid(), os.getresgid()
        with contextlib.suppress(OSError):
            os.setresgid(0, 0, 0)
        with contextlib.suppress(OSError):
            os.setresuid(0, 0, 0)
        if (os.getresuid(), os.getresgid()) != before:
            return f"{before} became {os.getresuid()}"
        raise Refused("EPERM")

    return attempt(("run one", run_setuid), ("setresuid", become))


def a09(data: dict[str, Any]) -> str:
    """A setuid and setgid program of one's own."""
    with open("/usr/bin/id", "rb") as source, open("id", "wb") as copy:
        copy.write(source.read())
    try:
        os.chmod("id", 0o6755)
    except OSError as error:
        return f"stopped: chmod {errno.errorcode[error.errno or 0]}"
    seen = subprocess.run(["./id", "-u"], capture_output=True, text=True).stdout.strip()
    own = str(os.getuid())
    return "stopped: no gain" if seen == own else f"SUCCEEDED: {own} became {seen!r}"


def a10(data: dict[str, Any]) -> str:
    """Files by handle, past every path."""
    handle = (ctypes.c_uint32 * 4)(8, 1, 2, 0)  # the root inode of a file system, mostly
    mount_id = (ctypes.c_int * 1)()
    return calls(
        ("name_to_handle_at", AT_FDCWD, b"/", handle, mount_id, 0),
        ("open_by_handle_at", AT_FDCWD, handle, os.O_RDONLY),
    )


def _create(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)


def _fill(folder: str, max_file_bytes: int) -> str:
    """Write at most `MAX_FILL_BYTES` in files of at most `max_file_bytes`."""
    written = number = 0
    while written < MAX_FILL_BYTES:
        fd = _create(os.path.join(folder, f"fill-{number}"))
        number += 1
        size = 0
        while size < max_file_bytes and written < MAX_FILL_BYTES:
            num = os.write(fd, MIB[: max_file_bytes - size])
            size += num
            written += num
        os.close(fd)
    return f"{written >> 20} MiB in {number} files"


def a11a(data: dict[str, Any]) -> str:
    return attempt(("one file", lambda: _fill(".", MAX_FILL_BYTES)))


def a11b(data: dict[str, Any]) -> str:
    return attempt(("many files", lambda: _fill(".", 2**21)))


def a12(data: dict[str, Any]) -> str:
    """More files than there may be, empty ones."""

    def many() -> str:
        for number in range(3000):
            os.close(_create(f"inode-{number}"))
        return "3000 files"

    return attempt(("many", many))


def _good() -> None:
    """What an honest agent leaves: it has to come out, whatever lies beside it."""
    with open("good", "w") as file:
        file.write("good")


def a13a(data: dict[str, Any]) -> str:
    """What is left behind are links, to files and to folders outside."""
    _good()
    for name in ("out", "result.json", "../home/out", "../tmp/out"):
        os.symlink(data["canary"], name)
    os.symlink(data["home"], "folder")
    os.mkdir("inner")
    os.symlink(data["home"], "inner/folder")
    os.symlink(data["canary"], "inner/file")
    os.symlink("/", "root")
    os.symlink("/proc/self/root", "magic")
    return "left"


def a13b(data: dict[str, Any]) -> str:
    """The working directory itself becomes a link to a folder outside."""
    work = os.getcwd()
    os.rename(work, work + "-before")
    os.symlink(os.path.dirname(data["canary"]), work)
    return "left"


def a13c(data: dict[str, Any]) -> str:
    """Hard links: one file under many names, also outside the working directory."""
    _good()
    os.link("good", "again")
    with open("../home/kept", "w") as file:
        file.write("not declared")
    os.link("../home/kept", "linked")
    return "left"


def a14(data: dict[str, Any]) -> str:
    """What is left behind changes all the time: a folder, a link, a folder ..."""
    _good()
    ready, tell = os.pipe()

    def swap() -> None:
        os.setsid()
        os.mkdir("out")
        with open("out/credentials", "w") as file:
            file.write("own")
        first = True
        while True:
            os.rename("out", "kept")
            os.symlink(os.path.dirname(data["canary"]), "out")
            if first:
                os.write(tell, b"!")
            first = False
            os.unlink("out")
            os.rename("kept", "out")

    forked(swap)
    os.read(ready, 1)
    return "left"


def a15a(data: dict[str, Any]) -> str:
    """Pipes, sockets, devices, folders without rights."""
    _good()
    os.mkfifo("fifo")
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
    for name, kind in (("null", stat.S_IFCHR), ("disk", stat.S_IFBLK)):
        with contextlib.suppress(OSError):
            os.mknod(name, kind | 0o666, os.makedev(1, 3))
    os.mknod("whiteout", stat.S_IFCHR | 0o666, 0)  # the one device that anybody may make
    os.mkdir("sealed")
    os.close(_create("sealed/file"))
    os.chmod("sealed", 0)
    return "left"


def a15b(data: dict[str, Any]) -> str:
    """Holes: a terabyte of nothing, or as much as there may be in one file, many times."""
    _good()
    size = 2**40
    os.close(_create("sparse"))
    while size:
        try:
            os.truncate("sparse", size)
            break
        except OSError:
            size //= 2
    for n in range(8):
        os.close(_create(f"sparse-{n}"))
        os.truncate(f"sparse-{n}", size)
    return f"left: {size}"


def a15c(data: dict[str, Any]) -> str:
    """A tree of up to 10,000 levels."""
    _good()
    depth, until = 0, time.monotonic() + 3  # under Landlock each level costs more than the last
    try:
        while depth < 10_000 and time.monotonic() < until:
            os.mkdir("deep")
            os.chdir("deep")
            depth += 1
    except OSError as error:
        return f"left: {depth} levels, then {errno.errorcode[error.errno or 0]}"
    return f"left: {depth} levels"


def a15d(data: dict[str, Any]) -> str:
    """Names that a terminal, a log, a shell or an encoder obeys."""
    _good()
    odd = (
        b"new\nline",
        b"\xff\xfe",
        b"\x1b[31mred",
        "\u202etxt".encode(),
        b"\t",
        b"\r",
        b"a" * 255,
    )
    for name in (*odd, b" ", b"-rf", b"$(id)", b"..."):
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT, 0o600))
    return "left"


def a15e(data: dict[str, Any]) -> str:
    """More files than anybody wants to look at."""
    _good()
    try:
        for n in range(50_000):
            os.close(_create(f"{n}"))
    except OSError as error:
        return f"left: {errno.errorcode[error.errno or 0]}"
    return "left: 50,000"


def a16a(data: dict[str, Any]) -> str:
    """The metadata of files outside."""
    canary = data["canary"]
    return attempt(
        ("chmod", lambda: os.chmod(canary, 0o644)),
        ("utime", lambda: os.utime(canary, (1, 1))),
        ("setxattr", lambda: os.setxattr(canary, "user.attack", b"1")),
        ("chown", lambda: os.chown(canary, -1, -1)),
        ("stat", lambda: f"{os.stat(canary).st_size} bytes"),
    )


def a16b(data: dict[str, Any]) -> str:
    """A lock on a file of the host that can be read: whoever else locks it has to wait."""

    def lock() -> str:
        with open(data["readme"]) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return "locked"

    return attempt(("flock", lock))


def a16c(data: dict[str, Any]) -> str:
    """The flags of a file that is open for reading, and its setuid bit."""
    get_flags, set_flags = 0x80086601, 0x40086602

    def flags() -> str:
        with open(data["readme"], "rb") as file:
            kept = bytearray(8)
            with contextlib.suppress(OSError):  # not every file system has them
                fcntl.ioctl(file, get_flags, kept)
            fcntl.ioctl(file, set_flags, bytes(kept))
        return "set"

    def change(path: str, code: int) -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, code, bytes(32))
        finally:
            os.close(fd)

    return attempt(
        ("FS_IOC_SETFLAGS", flags),
        ("FS_IOC_SETVERSION", lambda: change(data["readme"], 0x40087602)),
        ("FS_IOC_SET_ENCRYPTION_POLICY", lambda: change(data["project"], 0x800C6613)),
        ("file_setattr", lambda: call("file_setattr", -1, b"", None, 0, 0)),
        ("setuid", lambda: os.chmod(data["readme"], 0o4644)),
        ("setgid", lambda: os.chmod(data["project"], 0o2755)),
    )


def a16d(data: dict[str, Any]) -> str:
    """A lease on a file of the host that can be read: whoever opens it for writing has to wait."""

    def lease() -> str:
        fd = os.open(data["readme"], os.O_RDONLY)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        return "leased"

    return attempt(("F_SETLEASE", lease))


def a16e(data: dict[str, Any]) -> str:
    """Throw a file that others read out of memory."""

    def drop() -> None:
        fd = os.open(data["readme"], os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def advise(advice: int) -> None:
        with open(data["readme"], "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
        mapped.madvise(advice)

    cold, page_out = 20, 21
    return attempt(
        ("POSIX_FADV_DONTNEED", drop),
        ("MADV_COLD", lambda: advise(cold)),
        ("MADV_PAGEOUT", lambda: advise(page_out)),
    )


def a16g(data: dict[str, Any]) -> str:
    """Which pages of a file others have read lately."""

    def ask() -> str:
        whole, counts = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
        with open(data["readme"], "rb") as file:
            call("cachestat", file.fileno(), whole, counts, 0)
        return f"{counts[0]} pages"

    def read_what_is_there() -> str:
        with open(data["readme"], "rb") as file:
            return f"{os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)} bytes"

    return attempt(("cachestat", ask), ("RWF_NOWAIT", read_what_is_there))


def a16f(data: dict[str, Any]) -> str:
    """The mode and times of the host's devices that children have."""
    return attempt(
        ("chmod", lambda: os.chmod("/dev/null", 0o666)),
        ("utime", lambda: os.utime("/dev/zero")),
    )
