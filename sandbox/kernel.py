"""The few system calls that Python does not wrap, through the C library. Raises `OSError`.

Called by the layers, and by the processes around a child (guardian, keeper, zygote, init).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
import stat
from typing import Any

size_t = ctypes.c_size_t

_libc = ctypes.CDLL(None, use_errno=True)
# Calls through this one keep the interpreter's lock, which a fork has to.
_libc_locked = ctypes.PyDLL(None, use_errno=True)
for _library in (_libc, _libc_locked):
    _library.syscall.restype = ctypes.c_long

# From linux/sched.h.
CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
ALL_NAMESPACES = (
    CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
)

# The numbers of system calls since 5.0 are the same on every architecture.
SYS_OPEN_TREE = 428
SYS_MOVE_MOUNT = 429
SYS_OPENAT2 = 437
SYS_MOUNT_SETATTR = 442
SYS_LANDLOCK_CREATE_RULESET = 444
SYS_LANDLOCK_ADD_RULE = 445
SYS_LANDLOCK_RESTRICT_SELF = 446
_SYS_CLOSE_RANGE = ctypes.c_long(436)
_MAX_DESCRIPTOR = 2**31 - 1
_SYS_CLONE = {"x86_64": 56, "aarch64": 220}
MACHINE = os.uname().machine
_SYS_RT_SIGACTION = 13 if MACHINE == "x86_64" else 134
_SIGSET_BYTES = 8

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REC, MS_PRIVATE = 1 << 14, 1 << 18
MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_RESOLVE_NO_XDEV, _RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH = 1, 2, 4, 8

_MADV_POPULATE_READ, _MADV_POPULATE_WRITE, _MADV_COLLAPSE = 22, 23, 25
_HUGE_PAGE_BYTES = 2 * 2**20

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_SET_NAME = 15
PR_SET_SECCOMP = 22
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_GET_NO_NEW_PRIVS = 39
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

CAP_NET_ADMIN = 12
CAP_SYS_ADMIN = 21
_CAPABILITY_VERSION_3 = 0x20080522
NO_CORE = 1
"""The limit by which the kernel writes no core dump, and hands none to a program of the host's, as
it does with 0 (core(5); fs/coredump.c takes 1 for the end of a program that dumps itself)."""

_NUM_CAPABILITIES = 64


def syscall(what: str, number: int, *args: Any) -> int:
    """A system call by its number. Raises `OSError` naming it as `what`."""
    return _checked(_libc.syscall(ctypes.c_long(number), *args), what)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


# Processes.


def set_signal(number: int, action: signal.Handlers) -> None:
    """Like `signal.signal`, past it and the C library, which keep 32 and 33 to themselves."""
    sigaction = (ctypes.c_void_p * 4)(int(action), 0, 0, 0)
    nothing, size = ctypes.c_void_p(), size_t(_SIGSET_BYTES)
    syscall("rt_sigaction", _SYS_RT_SIGACTION, number, sigaction, nothing, size)


def reset_signals() -> None:
    """No signal is blocked, and none ignored but the two that Python ignores at its own start.

    Both are inherited over exec: from `nohup`, and from runtimes that ignore what Python's
    `signal` cannot name.
    """
    spared = (signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ)
    for number in range(1, 8 * _SIGSET_BYTES + 1):
        if number not in spared:
            set_signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _prctl(option: int, argument: int | ctypes.Array[ctypes.c_char] = 0, third: int = 0) -> int:
    if isinstance(argument, int):
        value = ctypes.c_ulong(argument)
    else:
        value = ctypes.c_ulong(ctypes.addressof(argument))
    zero = ctypes.c_ulong(0)
    result = _libc.prctl(ctypes.c_int(option), value, ctypes.c_ulong(third), zero, zero)
    return _checked(result, f"prctl({option})")


def become_subreaper() -> None:
    """Orphaned descendants become children of this process instead of pid 1's."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(signal_number: int) -> None:
    """Ask the kernel for `signal_number` when the parent thread ends. Cleared by fork."""
    _prctl(PR_SET_PDEATHSIG, signal_number)


def set_name(name: str) -> None:
    """The process's name in `ps` (15 bytes)."""
    _prctl(PR_SET_NAME, ctypes.create_string_buffer(name.encode()[:15]))


def set_dumpable(value: bool) -> None:
    """Whether processes of the same user may look into this one (its /proc files, ptrace)."""
    _prctl(PR_SET_DUMPABLE, int(value))


def raise_open_files() -> None:
    """As many as this process may have. It is also what may be in flight of all of this user's, so
    one with less than a child of the same user can be kept from passing any."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def ensure_core_limit() -> None:
    """Where it is 0 for good, root can still make it `NO_CORE`, which no other user can."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    if hard == 0:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_CORE, (NO_CORE, NO_CORE))


def set_no_new_privs() -> None:
    """From here on no `execve` grants privileges (setuid bits, file capabilities)."""
    _prctl(PR_SET_NO_NEW_PRIVS, 1)


def has_no_new_privs() -> bool:
    return _prctl(PR_GET_NO_NEW_PRIVS) == 1


def set_seccomp_filter(program: bytes) -> None:
    """Install a classic BPF program (`struct sock_filter`s of 8 bytes) for this thread."""
    code = ctypes.create_string_buffer(program, len(program))
    header = _BpfProgram(len(program) // 8, ctypes.addressof(code))
    mode_filter = 2
    _prctl(PR_SET_SECCOMP, mode_filter, ctypes.addressof(header))


class _BpfProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def keep_capabilities(keep: int) -> None:
    """Give up every capability that is not in the bit set `keep`, for good."""
    try:
        _prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a kernel without such a set: gVisor's
            raise
    drop, zero = ctypes.c_int(PR_CAPBSET_DROP), ctypes.c_ulong(0)
    for number in range(_NUM_CAPABILITIES):
        wanted = keep >> number & 1
        if not wanted and _libc.prctl(drop, ctypes.c_ulong(number), zero, zero, zero) < 0:
            break  # beyond this kernel's last one, or no right to: `capset` counts
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    low, high = keep & 0xFFFFFFFF, keep >> 32
    # Two of struct __user_cap_data_struct: effective, permitted, inheritable.
    data = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    _checked(_libc.capset(header, data), "capset")


def keep_capabilities_of_next_user() -> None:
    """The next change of users leaves them permitted, though not effective."""
    _prctl(PR_SET_KEEPCAPS, 1)


# Namespaces.


def unshare(namespaces: int) -> None:
    _checked(_libc.unshare(ctypes.c_int(namespaces)), "unshare")


def fork_into(namespaces: int) -> int:
    """`os.fork` into new namespaces: 0 in the child, its process id in the parent.

    The caller must be single-threaded.
    """
    python = ctypes.pythonapi
    number = _SYS_CLONE.get(MACHINE)
    if number is None:
        raise OSError(f"no system call numbers known for {MACHINE}")
    zero = ctypes.c_ulong(0)
    python.PyOS_BeforeFork()
    pid: int = _libc_locked.syscall(
        ctypes.c_long(number), ctypes.c_ulong(namespaces | signal.SIGCHLD), zero, zero, zero, zero
    )
    if pid == 0:
        python.PyOS_AfterFork_Child()
        return 0
    python.PyOS_AfterFork_Parent()
    return _checked(pid, "clone")


def enter(fd: int, namespaces: int) -> None:
    """Join `namespaces` of the process that the pidfd `fd` means."""
    _checked(_libc.setns(ctypes.c_int(fd), ctypes.c_int(namespaces)), "setns")


def map_user(process: int | str, inside: int, uid: int, gid: int) -> None:
    """Make `inside` in the user namespace of `process` (an id, or "self") mean `uid` and `gid`."""
    for name, content in (
        ("setgroups", "deny"),  # without it an unprivileged user may not map groups
        ("uid_map", f"{inside} {uid} 1"),
        ("gid_map", f"{inside} {gid} 1"),
    ):
        fd = os.open(f"/proc/{process}/{name}", os.O_WRONLY)
        try:
            os.write(fd, content.encode())
        finally:
            os.close(fd)


def set_host_name(name: str) -> None:
    encoded = name.encode()
    _checked(_libc.sethostname(encoded, ctypes.c_size_t(len(encoded))), "sethostname")


# Mounts.


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    result = _libc.mount(
        source.encode(),
        os.fsencode(target),
        kind.encode(),
        ctypes.c_ulong(flags),
        options.encode() or None,
    )
    _checked(result, f"mount {kind or source} at {target}")


def unmount(target: str, flags: int = MNT_DETACH) -> None:
    """Take it out of the tree at once; it ends when its last user does. With no flags it ends here,
    or is refused (EBUSY) where it has users."""
    _checked(_libc.umount2(os.fsencode(target), ctypes.c_int(flags)), f"umount {target}")


def clone_tree(path: str) -> int:
    """A descriptor of a detached copy of the mounts at and below `path`."""
    flags = _OPEN_TREE_CLONE | _AT_RECURSIVE | os.O_CLOEXEC
    return syscall(
        f"open_tree {path}", SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(path), ctypes.c_uint(flags)
    )


def attach_tree(fd: int, target: str) -> None:
    syscall(
        f"move_mount to {target}",
        SYS_MOVE_MOUNT,
        fd,
        b"",
        _AT_FDCWD,
        os.fsencode(target),
        ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH),
    )


def restrict_tree(fd: int, attributes: int, path: str = "", recursive: bool = True) -> None:
    """Add `MOUNT_ATTR_*` to the mounts at `path` or, where that is "", of the descriptor."""
    flags = (_AT_EMPTY_PATH if not path else 0) | (_AT_RECURSIVE if recursive else 0)
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)  # struct mount_attr
    syscall(
        "mount_setattr",
        SYS_MOUNT_SETATTR,
        fd,
        os.fsencode(path),
        ctypes.c_uint(flags),
        wanted,
        ctypes.c_size_t(ctypes.sizeof(wanted)),
    )


def pivot_root(folder: str) -> None:
    """Make `folder`, a mount, the root, and drop the old root."""
    os.chdir(folder)
    # pivot_root(2): both arguments may be "." where the old root is unmounted right after.
    _checked(_libc.pivot_root(b".", b"."), "pivot_root")
    unmount(".")
    os.chdir("/")


# Memory.


def collapse_private_memory() -> None:
    """Put this process's private memory on huge pages where the kernel can (Linux 6.1).

    A fork then copies one entry of the page table where it would copy 512. Best effort.
    """
    with open("/proc/self/maps", "rb") as file:
        lines = file.read().splitlines()
    for line in lines:
        addresses, permissions, _, _, inode, *path = line.split(maxsplit=5)
        if inode != b"0" or not permissions.startswith(b"rw-p") or path not in ([], [b"[heap]"]):
            continue
        start, end = (int(address, 16) for address in addresses.split(b"-"))
        start = -(-start // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        end = end // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
        if start < end:
            _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_COLLAPSE)


def populate(start: int, size: int, written: bool) -> None:
    """Make the pages there present, and this process's own where they are `written` to.

    Best effort: what is not mapped (any more) is left out.
    """
    advice = _MADV_POPULATE_WRITE if written else _MADV_POPULATE_READ
    _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)


# Descriptors.


def open_beneath(folder: int, path: str, flags: int) -> int:
    """`os.open(path)` below the descriptor `folder`: through no link, and on the same mount.

    A relative path without "..". In gVisor, of 2022 at least, part by part.
    """
    resolve = _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_XDEV
    how = (ctypes.c_uint64 * 3)(flags | os.O_CLOEXEC, 0, resolve)  # struct open_how
    size = ctypes.c_size_t(ctypes.sizeof(how))
    try:
        return syscall(f"openat2 {path}", SYS_OPENAT2, folder, os.fsencode(path), how, size)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
    return walk_beneath(folder, path, flags)


def walk_beneath(folder: int, path: str, flags: int) -> int:
    """`open_beneath` for kernels without openat2. A mount is known by its device only."""
    device = os.fstat(folder).st_dev
    *folders, last = path.split("/")
    at = os.dup(folder)
    try:
        for part in folders:
            below = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            os.close(at)
            at = below
            if stat.S_ISLNK(os.fstat(at).st_mode):
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        found = os.open(last, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
    finally:
        os.close(at)
    if os.fstat(found).st_dev != device:
        os.close(found)
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
    return found


def close_all_descriptors_but(keep: set[int]) -> None:
    """Close every open descriptor that is not in `keep`, whatever the limit was when it came."""
    first = 0
    for fd in [*sorted(keep), _MAX_DESCRIPTOR]:
        bounds = ctypes.c_uint(first), ctypes.c_uint(fd - 1)
        if first < fd and _libc.syscall(_SYS_CLOSE_RANGE, *bounds, ctypes.c_uint(0)) < 0:
            _close_all_listed_but(keep)  # before Linux 5.9
            return
        first = fd + 1


def _close_all_listed_but(keep: set[int]) -> None:
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd not in keep:
            try:
                os.close(fd)
            except OSError:  # the listing's own descriptor, closed by now
                continue
