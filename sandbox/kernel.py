"""The few system calls that Python does not wrap, through the C library.

Called by the layers, the zygote and whoever must inherit orphans. Raises `OSError`.
"""

from __future__ import annotations

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_GET_NO_NEW_PRIVS = 39


def _prctl(option: int, argument: int | ctypes.Array[ctypes.c_char] = 0) -> int:
    if isinstance(argument, int):
        value = ctypes.c_ulong(argument)
    else:
        value = ctypes.c_ulong(ctypes.addressof(argument))
    zero = ctypes.c_ulong(0)
    result: int = _libc.prctl(ctypes.c_int(option), value, zero, zero, zero)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"prctl({option})")
    return result


def become_subreaper() -> None:
    """Orphaned descendants become children of this process instead of pid 1's."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(signal_number: int) -> None:
    """Ask the kernel for `signal_number` when the parent thread ends. Cleared by fork."""
    _prctl(PR_SET_PDEATHSIG, signal_number)


def set_name(name: str) -> None:
    """The process's name in `ps` (15 bytes)."""
    _prctl(PR_SET_NAME, ctypes.create_string_buffer(name.encode()[:15]))


def set_no_new_privs() -> None:
    """From here on no `execve` grants privileges (setuid bits, file capabilities)."""
    _prctl(PR_SET_NO_NEW_PRIVS, 1)


def has_no_new_privs() -> bool:
    return _prctl(PR_GET_NO_NEW_PRIVS) == 1


def close_all_descriptors_but(keep: set[int]) -> None:
    """Close every open descriptor that is not in `keep`.

    Goes by /proc/self/fd, which cannot miss one whatever the limits were when it was opened.
    """
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd not in keep:
            try:
                os.close(fd)
            except OSError:  # the listing's own descriptor, closed by now
                continue
