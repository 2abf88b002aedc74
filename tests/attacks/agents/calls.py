"""What hostile code needs: raw system calls by number, and a way to say how an attempt ended.

Standard library only: it runs in a bare interpreter, inside a child. An attack is a list of
*attempts*; each raises `OSError` (the kernel refused), raises `Refused` (it had no effect), or
returns what it got hold of. Whoever judges must know *why* an attempt failed: an attack that fails
because it was badly made (EFAULT, EINVAL) would prove nothing, so reasons are named one by one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from collections.abc import Callable
from typing import Any

Attempt = tuple[str, Callable[[], Any]]

UDP_LITE = 136
"""The level of options by which UDP's are also known."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

# Name → its number on x86_64 and on aarch64.
_NUMBERS = {
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "bpf": (321, 280),
    "cachestat": (451, 451),
    "chroot": (161, 51),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "clone": (56, 220),
    "clone3": (435, 435),
    "delete_module": (176, 106),
    "fadvise64": (221, 223),
    "fanotify_init": (300, 262),
    "file_setattr": (469, 469),
    "finit_module": (313, 273),
    "fdatasync": (75, 83),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "fsync": (74, 82),
    "getpid": (39, 172),
    "init_module": (175, 105),
    "inotify_init1": (294, 26),
    "io_getevents": (208, 4),
    "io_setup": (206, 0),
    "io_submit": (209, 2),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioctl": (16, 29),
    "ioperm": (173, None),
    "iopl": (172, None),
    "ioprio_set": (251, 30),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "linkat": (265, 37),
    "listmount": (458, 458),
    "lsm_get_self_attr": (459, 459),
    "lsm_list_modules": (461, 461),
    "lsm_set_self_attr": (460, 460),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mmap": (9, 222),
    "modify_ldt": (154, None),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "mq_open": (240, 180),
    "msgget": (68, 186),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "open_tree_attr": (467, 467),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pivot_root": (155, 41),
    "prctl": (157, 167),
    "prlimit64": (302, 261),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "rt_sigqueueinfo": (129, 138),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "sched_setscheduler": (144, 119),
    "semget": (64, 190),
    "sendmmsg": (307, 269),
    "setns": (308, 268),
    "setpriority": (141, 140),
    "settimeofday": (164, 170),
    "shmget": (29, 194),
    "statmount": (457, 457),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "sync": (162, 81),
    "sync_file_range": (277, 84),
    "syncfs": (306, 267),
    "tgkill": (234, 131),
    "timer_create": (222, 107),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semop": (65, 193),
    "semctl": (66, 191),
    "semtimedop": (220, 192),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_unlink": (241, 181),
    "mq_timedsend": (242, 182),
    "mq_timedreceive": (243, 183),
}


class Refused(Exception):
    """The attempt had no effect; its text says why, in a word or two."""


def call(name: str, *args: int | bytes | str | ctypes.Array[Any] | ctypes.Structure | None) -> int:
    """A system call. Raises `OSError`, and `Refused` where this machine has no such call."""
    number = _NUMBERS[name][0 if platform.machine() == "x86_64" else 1]
    if number is None:
        raise Refused("no such call on this machine")
    return raw_call(number, *args)


def raw_call(number: int, *args: Any) -> int:
    result: int = _libc.syscall(ctypes.c_long(number), *[_argument(value) for value in args])
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _argument(value: Any) -> Any:
    if isinstance(value, int):
        return ctypes.c_ulong(value & (2**64 - 1))
    if isinstance(value, str):
        return ctypes.c_char_p(value.encode())
    if isinstance(value, bytes):
        return ctypes.c_char_p(value)
    return value if value is None else ctypes.byref(value)


def attempt(*attempts: Attempt) -> str:
    """All of them, in order: the first success is what counts, else each reason is named."""
    reasons = []
    for name, act in attempts:
        try:
            got = act()
        except (OSError, Refused, MemoryError) as error:
            reasons.append(f"{name} {_reason(error)}")
        else:
            return f"SUCCEEDED: {name}" + (f": {got}" if got is not None else "")
    return "stopped: " + ", ".join(reasons)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, TimeoutError):
        return errno.errorcode.get(error.errno or 0, str(error))
    return str(error) or type(error).__name__


def calls(*named: tuple[Any, ...]) -> str:
    """`attempt` of system calls, each a tuple of its name and arguments."""
    return attempt(*((each[0], lambda each=each: f"returned {call(*each)}") for each in named))


def read_file(path: str) -> Callable[[], str]:
    def act() -> str:
        with open(path, "rb") as file:
            return f"{len(file.read(4096))} bytes of {path}"

    return act


def forked(act: Callable[[], None]) -> int:
    """Run `act` in a process of its own, which then ends."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
        finally:
            os._exit(0)
    return pid
