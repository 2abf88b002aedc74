"""seccomp: which system calls there are. Everything that agents need, without the kernel's attics.

A call is refused if it is in `_DENIED`, or newer than the last one that was looked at (`_LAST`);
the entry points of other architectures (i386, x32) end the process. Filters add up and are
inherited by every process. Format: classic BPF over `struct seccomp_data`, seccomp(2).
"""

from __future__ import annotations

import errno
import functools
import os
import struct
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Optional

from .. import kernel
from .context import Context

NAME = "seccomp"

_LAST = 469  # file_setattr
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_BIT = 0x40000000

# Name → its number on x86_64 and on aarch64 (None: there is no such call there).
_Numbers = tuple[Optional[int], Optional[int]]
_DENIED: Mapping[str, _Numbers] = {
    # Mounts, roots, namespaces.
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "statmount": (457, 457),
    "listmount": (458, 458),
    "open_tree_attr": (467, 467),
    "unshare": (272, 97),
    "setns": (308, 268),
    # Other processes' memory, descriptors and identity.
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    # Files by handle, past every path rule.
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # Kernel surface that agents do not need and exploits do.
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    "lookup_dcookie": (212, 18),
    "memfd_secret": (447, 447),
    "lsm_get_self_attr": (459, 459),
    "lsm_set_self_attr": (460, 460),
    "lsm_list_modules": (461, 461),
    # The machine itself.
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    # All that the machine has yet to write, of everybody.
    "sync": (162, 81),
    "syncfs": (306, 267),
    "file_setattr": (469, 469),
    "syslog": (103, 116),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "nfsservctl": (180, 42),
    "vhangup": (153, 58),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "uselib": (134, None),
    "ustat": (136, None),
    "sysfs": (139, None),
    "_sysctl": (156, None),
    # Scheduling and memory placement at the cost of others.
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "set_mempolicy_home_node": (450, 450),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # Memory that no process's limit counts: System V's, POSIX queues, files without a path. And
    # what others have of the former, which is found by counting: where there is no namespace.
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "shmdt": (67, 197),
    "semget": (64, 190),
    "semop": (65, 193),
    "semctl": (66, 191),
    "semtimedop": (220, 192),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "mq_timedsend": (242, 182),
    "mq_timedreceive": (243, 183),
    "mq_notify": (244, 184),
    "mq_getsetattr": (245, 185),
    "memfd_create": (319, 279),
}
# As on a kernel without them, which callers know how to live with.
_ABSENT: Mapping[str, _Numbers] = {
    # Its flags are behind a pointer, where no filter sees them; the C library then uses clone.
    "clone3": (435, 435),
    # A user has few (fs.inotify.max_user_instances), children and trainer together; and they tell
    # what others do with files that can be read.
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    # Of its events there are few for all of the machine (fs.aio-max-nr), and databases need them.
    "io_setup": (206, 0),
    "io_destroy": (207, 1),
    "io_getevents": (208, 4),
    "io_submit": (209, 2),
    "io_cancel": (210, 3),
    "io_pgetevents": (333, 292),
    # Which files others have read lately.
    "cachestat": (451, 451),
    # The size is behind a pointer: see `MAX_ATTRIBUTE_BYTES`.
    "setxattrat": (463, 463),
}
# Done, as far as the caller can tell: a child's files are gone with it, and on the host's, which it
# can only read, this has a disk write what it holds back.
_NOTHING: Mapping[str, _Numbers] = {
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "sync_file_range": (277, 84),
}
_CLONE: _Numbers = (56, 220)
_SOCKET: _Numbers = (41, 198)
_SOCKETPAIR: _Numbers = (53, 199)
_SETSOCKOPT: _Numbers = (54, 208)
_GETSOCKOPT: _Numbers = (55, 209)
_SENDTO: _Numbers = (44, 206)
_SENDMSG: _Numbers = (46, 211)
_SENDMMSG: _Numbers = (307, 269)
_IOCTL: _Numbers = (16, 29)
_PERSONALITY: _Numbers = (135, 92)
_PRLIMIT: _Numbers = (302, 261)
_SETPRIORITY: _Numbers = (141, 140)
_IOPRIO_SET: _Numbers = (251, 30)
_SETRLIMIT: _Numbers = (160, 164)
_FCNTL: _Numbers = (72, 25)
_PRCTL: _Numbers = (157, 167)
_FADVISE: _Numbers = (221, 223)
_LISTEN: _Numbers = (50, 201)
_MADVISE: _Numbers = (28, 233)
_MMAP: _Numbers = (9, 222)
_PREADV2: _Numbers = (327, 286)
# Each with the place of the size among its arguments.
_SETXATTRS: Mapping[str, tuple[_Numbers, int]] = {
    "setxattr": ((188, 5), 3),
    "lsetxattr": ((189, 6), 3),
    "fsetxattr": ((190, 7), 3),
}
# Each with the place of the mode among its arguments.
_CHMODS: Mapping[str, tuple[_Numbers, int]] = {
    "chmod": ((90, None), 1),
    "fchmod": ((91, 52), 1),
    "fchmodat": ((268, 53), 2),
    "fchmodat2": ((452, 452), 2),
}

# Of terminals and descriptors; and copies that share blocks (FICLONE, FICLONERANGE), flags of files
# (FS_IOC_GETFLAGS). Others change files that are open for reading only, look into namespaces, have
# a file system write out all that it holds.
_TERMINAL_IOCTLS = 0x5400
_IOCTL_TYPE_MASK = 0xFF00
_IOCTLS = (
    *(0x40049409, 0x4020940D, 0x80086601),
    # Of sockets: who is signaled, where urgent data stand, what was not sent.
    *(0x8901, 0x8902, 0x8903, 0x8904, 0x8905, 0x894B),
    # SIOCGIF*: names, addresses, masks, flags, sizes and numbers of devices. Others have the kernel
    # load modules for whoever asks (bridges, VLANs), rewrite its own code (SIOCGSTAMP), or keep
    # routes in memory that no group counts, for which a hostile zygote's children have the rights.
    *(0x8910, 0x8912, 0x8913, 0x8915, 0x8917, 0x8919, 0x891B, 0x891D),
    *(0x8921, 0x8927, 0x8933, 0x8942, 0x8970),
)
_PERMITTED_IOCTLS = {"SIOCSIFFLAGS": 0x8914}
"""By name, for who makes networks under this filter."""
# SIOCETHTOOL: as of a device that knows of none.
_ETHTOOL = 0x8946
# TIOCSTI, TIOCLINUX: type into the terminal; TIOCSETD: have the kernel load a line discipline.
_DENIED_IOCTLS = (0x5412, 0x541C, 0x5423)
# F_SETLEASE: whoever opens the file for writing has to wait; F_NOTIFY: an inotify of old.
_DENIED_FCNTLS = (1024, 1026)
_F_SETFL = 4  # with O_DIRECT, each byte that a child writes to its output has to be read by itself
# PR_SCHED_CORE: keeps others off the core's other thread; PR_FUTEX_HASH: memory that no limit of a
# process counts; PR_SET_MEMORY_MERGE: pages that become one with others' tell what is in those, and
# the kernel's own time goes into the search.
_DENIED_PRCTLS = (62, 78, 67)
_PR_SET_VMA = 0x53564D41  # names for each of 65,530 mappings, in memory that no limit counts
_POSIX_FADV_DONTNEED = 4  # throws what others have read out of memory
_MADV_COLD, _MADV_PAGEOUT = 20, 21  # the same, where a file is mapped
_MADV_MERGEABLE = 12  # as PR_SET_MEMORY_MERGE
_MAP_HUGETLB = 0x40000  # of the machine's, which nothing gives out by user or group
_RWF_NOWAIT = 0x8  # tells what others have read, as cachestat
MAX_ATTRIBUTE_BYTES = 512
"""An access list takes more than its size of the kernel's memory, in no group's account: at 64 KiB,
every folder of a child could have 200 KB of it."""
_SUID_SGID = 0o6000
_CLONE_PARENT = 0x8000  # a child of the zygote's, whose CPU time would count for no child
_NEW_NAMESPACES = kernel.ALL_NAMESPACES | 0x02000000 | 0x00000080  # and cgroup, time
_AF_UNIX, _AF_INET, _AF_INET6 = 1, 2, 10
_SOCK_STREAM, _SOCK_DGRAM, _SOCK_SEQPACKET, _SOCK_TYPE_MASK = 1, 2, 5, 0xF
_IPPROTO_TCP, _IPPROTO_UDP = 6, 17
_MSG_FASTOPEN = 0x20000000
_MSG_OOB = 0x1
_MSG_MORE = 0x8000
# What the kernel keeps of a socket in memory that no limit counts, up to 200 KB for each: copies of
# what was sent (SO_ZEROCOPY, SO_TIMESTAMPING), errors (IP_RECVERR, IPV6_RECVERR), groups and their
# sources (*_MEMBERSHIP, MSFILTER, MCAST_*), headers (IPV6_2292PKTOPTIONS, IPV6_HOPOPTS and its
# like), labels of flows. There is nobody but itself for a child to talk to with them.
_SOCKET_KEEPS = (60, 37, 65)
# SO_TIMESTAMP and SO_TIMESTAMPNS, the old and the new, and UDP_GRO: the first socket that has one,
# and the last that had it, make the kernel rewrite its own code, for which it stops each processor,
# in time that is nobody's.
_SOCKET_SWITCHES = (29, 35, 63, 64)
_UDP_GRO = 104
_IP_KEEPS = (11, 35, 39, 41, 42, 46, 48)
_IPV6_KEEPS = (25, 20, 27, 42, 46, 48, 6, 54, 55, 57, 59, 32)
_UDP_CORK = 1  # as MSG_MORE
# Level → options; there are no others: 136, of UDP-Lite, is another name for UDP's own. Those: fast
# open and other protocols on top of TCP, and signatures of its segments, for
# which the kernel loads what they name; programs for the kernel's filter machine (BPF); ESP and
# L2TP in UDP; tables of netfilter's and policies of IPsec, for which a zygote that enters the
# namespaces of its children has the rights.
_SOL_IP, _SOL_SOCKET, _SOL_IPV6 = 0, 1, 41
_DENIED_OPTIONS = {
    _IPPROTO_TCP: (30, 31, 14, 32, 38, 39, 42),
    _SOL_SOCKET: (26, 50, 51, 52, *_SOCKET_KEEPS, *_SOCKET_SWITCHES),
    _IPPROTO_UDP: (100, _UDP_CORK, _UDP_GRO),
    _SOL_IP: (16, 17, 64, 65, 96, 97, 128, 129, *_IP_KEEPS),
    _SOL_IPV6: (34, 35, 64, 65, *_IPV6_KEEPS),
}
# The same tables: where they are asked for, the kernel loads them; and SO_NETNS_COOKIE, which tells
# how many networks the machine has made.
_DENIED_QUESTIONS = {
    _SOL_SOCKET: (71,),
    _SOL_IP: (64, 65, 66, 67, 96, 97, 98, 99, 128, 129, 130, 131),
    _SOL_IPV6: (64, 65, 68, 69),
}
_RLIMIT_CORE = 4

# struct seccomp_data {int nr; u32 arch; u64 instruction_pointer; u64 args[6];}, little-endian
_NR, _ARCH, _ARGS = 0, 4, 16
_LD_W_ABS, _JEQ, _JGT, _JGE, _JSET, _AND, _RET = 0x20, 0x15, 0x25, 0x35, 0x45, 0x54, 0x06
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000

_Instruction = tuple[int, int, int, int]


def probe() -> str:
    if kernel.MACHINE not in _AUDIT_ARCH:
        return f"there is no list of system calls for {kernel.MACHINE}"
    try:
        kernel.set_no_new_privs()
        kernel.set_seccomp_filter(base_filter(permit=(), only_tcp=False))
        os.getpid()
        kernel.unshare(kernel.CLONE_NEWUTS)
    except OSError as error:
        return "" if error.errno == errno.EPERM else f"the kernel refuses a filter: {error}"
    return "a filter was accepted, but does not filter"


def prepare(args: Mapping[str, Any]) -> None:
    """Assemble the filter."""
    _program(args)


def apply(args: Mapping[str, Any], context: Context) -> None:
    """`deny`: only these, on top of a filter that is there; else the whole filter, but for
    `permit`; `only_tcp`: neither UDP nor Unix sockets, for where the network is not its own."""
    kernel.set_seccomp_filter(_program(args))


def _program(args: Mapping[str, Any]) -> bytes:
    if "deny" in args:
        return deny_filter(tuple(args["deny"]))
    return base_filter(permit=args["permit"], only_tcp=args["only_tcp"])


@functools.cache
def deny_filter(names: tuple[str, ...]) -> bytes:
    """Assembled once: a zygote's children find it made."""
    code = _prologue()
    for name in names:
        code += _on(_number(_DENIED[name]), [_errno(errno.EPERM)])
    return _assemble([*code, _ret(_ALLOW)])


def base_filter(*, permit: Collection[str], only_tcp: bool) -> bytes:
    code = _prologue()
    code += [(_JGT, 0, 1, _LAST), _errno(errno.ENOSYS)]
    for name, numbers in _DENIED.items():
        number = _number(numbers)
        if number is not None and name not in permit:
            code += _on(number, [_errno(errno.EPERM)])
    for numbers in _ABSENT.values():
        code += _on(_number(numbers), [_errno(errno.ENOSYS)])
    for numbers in _NOTHING.values():
        code += _on(_number(numbers), [_errno(0)])
    code += _on(_number(_CLONE), [*_refuse_bits(0, _NEW_NAMESPACES | _CLONE_PARENT), _ret(_ALLOW)])
    code += _on(_number(_SOCKET), _socket_rule(only_tcp))
    code += _on(_number(_SOCKETPAIR), _pair_rule(only_tcp))
    # Limits and priorities of oneself only (process 0): Landlock has no rule for those of others.
    code += _on(_number(_PRLIMIT), [*_require(0, 0), *_keep_core_limit()])
    code += _on(_number(_SETRLIMIT), [_arg(0), (_JEQ, 0, 1, _RLIMIT_CORE), _errno(0), _ret(_ALLOW)])
    code += _on(_number(_SETPRIORITY), [*_require(0, 0), *_require(1, 0), _ret(_ALLOW)])
    code += _on(_number(_IOPRIO_SET), [*_require(0, 1), *_require(1, 0), _ret(_ALLOW)])
    # TCP fast open connects without connect(), so past Landlock's rule for ports. Urgent data are a
    # part of Unix sockets that nobody uses but exploits. A datagram of which more is to come waits
    # in memory that no limit counts.
    flags = _MSG_FASTOPEN | _MSG_OOB | _MSG_MORE
    code += _on(_number(_SENDTO), [*_refuse_bits(3, flags), _ret(_ALLOW)])
    code += _on(_number(_SENDMMSG), [*_refuse_bits(3, flags), _ret(_ALLOW)])
    code += _on(_number(_SENDMSG), [*_refuse_bits(2, flags), _ret(_ALLOW)])
    code += _on(_number(_SETSOCKOPT), [*_option_rule(_DENIED_OPTIONS), _errno(errno.ENOPROTOOPT)])
    code += _on(_number(_GETSOCKOPT), [*_option_rule(_DENIED_QUESTIONS), _ret(_ALLOW)])
    code += _on(_number(_IOCTL), _ioctl_rule(permit))
    packets = [_arg(2), (_JSET, 0, 1, os.O_DIRECT), _errno(errno.EINVAL)]
    packets.insert(0, (_JEQ, 0, len(packets), _F_SETFL))
    code += _on(_number(_FCNTL), [*_refuse_values(1, _DENIED_FCNTLS), *packets, _ret(_ALLOW)])
    names = _refuse_values(0, (_PR_SET_VMA,), errno.EINVAL)
    code += _on(_number(_PRCTL), [*_refuse_values(0, _DENIED_PRCTLS), *names, _ret(_ALLOW)])
    code += _on(_number(_FADVISE), [*_refuse_values(3, (_POSIX_FADV_DONTNEED,)), _ret(_ALLOW)])
    advice = [*_refuse_values(2, (_MADV_MERGEABLE, _MADV_COLD, _MADV_PAGEOUT)), _ret(_ALLOW)]
    code += _on(_number(_MADVISE), advice)
    code += _on(_number(_MMAP), [*_refuse_bits(3, _MAP_HUGETLB, errno.ENOMEM), _ret(_ALLOW)])
    now = _refuse_bits(5, _RWF_NOWAIT, errno.EOPNOTSUPP)
    code += _on(_number(_PREADV2), [*now, _ret(_ALLOW)])
    for numbers, at in _SETXATTRS.values():
        too_large = [_arg(at), (_JGT, 0, 1, MAX_ATTRIBUTE_BYTES), _errno(errno.ENOSPC)]
        code += _on(_number(numbers), [*too_large, _ret(_ALLOW)])
    if only_tcp:
        # Without bind, which Landlock refuses, the kernel picks a port, of all addresses.
        code += _on(_number(_LISTEN), [_errno(errno.EPERM)])
        # Landlock has no rule for modes: here this user's files outside are in reach.
        for numbers, at in _CHMODS.values():
            code += _on(_number(numbers), [*_refuse_bits(at, _SUID_SGID), _ret(_ALLOW)])
    ask, default = 0xFFFFFFFF, 0
    persona = [_arg(0), (_JEQ, 2, 0, ask), (_JEQ, 1, 0, default), _errno(errno.EPERM)]
    code += _on(_number(_PERSONALITY), [*persona, _ret(_ALLOW)])
    return _assemble([*code, _ret(_ALLOW)])


def _socket_rule(only_tcp: bool) -> list[_Instruction]:
    """Plain TCP, and UDP and Unix sockets: not Multipath TCP, netlink, packet, vsock, AF_ALG.

    `only_tcp` leaves the first: Landlock has no rule for UDP, nor for Unix sockets by their path,
    where other services of the user listen. (`socketpair` is another system call.)
    """
    refuse = _errno(errno.EPERM)
    # For a protocol of another type, or a type without one, the kernel looks for a module (DCCP),
    # each time, which is a program that it starts.
    kinds = {_SOCK_STREAM: _IPPROTO_TCP, **({} if only_tcp else {_SOCK_DGRAM: _IPPROTO_UDP})}
    internet = [_arg(1), (_AND, 0, 0, _SOCK_TYPE_MASK)]
    for kind, protocol in kinds.items():
        own = [_arg(2), (_JEQ, 1, 0, 0), (_JEQ, 0, 1, protocol), _ret(_ALLOW), refuse]
        internet += [(_JEQ, 0, len(own), kind), *own]
    internet.append(refuse)
    unix = [(_JEQ, 0, 1, _AF_UNIX), refuse if only_tcp else _ret(_ALLOW)]
    return [
        _arg(0),
        *unix,
        (_JEQ, 2, 0, _AF_INET),
        (_JEQ, 1, 0, _AF_INET6),
        refuse,
        *internet,
    ]


def _pair_rule(only_tcp: bool) -> list[_Instruction]:
    """Unix sockets; with `only_tcp` streams and packets, which stay connected to each other: one of
    a pair for datagrams (raw ones are the same to the kernel) can send to any path."""
    kind = [
        _arg(1),
        (_AND, 0, 0, _SOCK_TYPE_MASK),
        (_JEQ, 2, 0, _SOCK_STREAM),
        (_JEQ, 1, 0, _SOCK_SEQPACKET),
        _errno(errno.EPERM),
    ]
    return [*_require(0, _AF_UNIX), *(kind if only_tcp else []), _ret(_ALLOW)]


def _option_rule(denied: Mapping[int, Iterable[int]]) -> list[_Instruction]:
    """Of the levels in `denied`; other levels go on behind it."""
    code = []
    for level, options in denied.items():
        decided = [*_refuse_values(2, options), _ret(_ALLOW)]
        code += [_arg(1), (_JEQ, 0, len(decided), level), *decided]
    return code


def _ioctl_rule(permit: Collection[str]) -> list[_Instruction]:
    code = _refuse_values(1, _DENIED_IOCTLS)
    permitted = [number for name, number in _PERMITTED_IOCTLS.items() if name in permit]
    for allowed in (*_IOCTLS, *permitted):
        code += [(_JEQ, 0, 1, allowed), _ret(_ALLOW)]
    return [
        *code,
        *((_JEQ, 0, 1, _ETHTOOL), _errno(errno.EOPNOTSUPP)),
        (_AND, 0, 0, _IOCTL_TYPE_MASK),
        *((_JEQ, 0, 1, _TERMINAL_IOCTLS), _ret(_ALLOW)),
        _errno(errno.ENOTTY),
    ]


def _prologue() -> list[_Instruction]:
    return [
        (_LD_W_ABS, 0, 0, _ARCH),
        (_JEQ, 1, 0, _AUDIT_ARCH[kernel.MACHINE]),
        _ret(_KILL_PROCESS),
        (_LD_W_ABS, 0, 0, _NR),
        *([(_JGE, 0, 1, _X32_BIT), _ret(_KILL_PROCESS)] if kernel.MACHINE == "x86_64" else []),
    ]


def _on(number: int | None, block: list[_Instruction]) -> list[_Instruction]:
    """`block`, which must end in a return, where the call is `number`."""
    return [] if number is None else [(_JEQ, 0, len(block), number), *block]


def _refuse_bits(arg: int, bits: int, code: int = errno.EPERM) -> list[_Instruction]:
    return [_arg(arg), (_JSET, 0, 1, bits), _errno(code)]


def _refuse_values(arg: int, values: Iterable[int], code: int = errno.EPERM) -> list[_Instruction]:
    instructions = [_arg(arg)]
    for value in values:
        instructions += [(_JEQ, 0, 1, value), _errno(code)]
    return instructions


def _keep_core_limit() -> list[_Instruction]:
    """prlimit: as if it were done where the limit for core dumps is to be set: with a lower one, 0,
    the kernel hands a dump to the host's own program for them, where it has one (core(5))."""
    return [
        *(_arg(1), (_JEQ, 0, 5, _RLIMIT_CORE)),
        *(_arg(2), (_JEQ, 0, 2, 0)),
        *((_LD_W_ABS, 0, 0, _ARGS + 8 * 2 + 4), (_JEQ, 1, 0, 0)),  # the pointer's high half
        _errno(0),
        _ret(_ALLOW),
    ]


def _require(arg: int, value: int) -> list[_Instruction]:
    return [_arg(arg), (_JEQ, 1, 0, value), _errno(errno.EPERM)]


def _arg(index: int) -> _Instruction:
    """The low half: what is compared here are ints, of which the kernel reads no more."""
    return (_LD_W_ABS, 0, 0, _ARGS + 8 * index)


def _ret(action: int) -> _Instruction:
    return (_RET, 0, 0, action)


def _errno(number: int) -> _Instruction:
    return _ret(_ERRNO | number)


def _number(numbers: _Numbers) -> int | None:
    return numbers[0 if kernel.MACHINE == "x86_64" else 1]


def _assemble(code: list[_Instruction]) -> bytes:
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
