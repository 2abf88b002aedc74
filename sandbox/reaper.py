"""Finding, killing and reaping whatever a child leaves behind.

Every process that ends a child (its init, the zygote, the guardian) is a subreaper: a descendant
whose parent dies becomes its direct child, whatever sessions, forks and ignored signals it went
through. So "no children left" means "no descendants left", and that is what is waited for.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import select
import signal
import time
from collections.abc import Container, Iterator
from typing import Any

KILL_TIMEOUT_S = 5.0
"""A process that SIGKILL does not end in this time sits in the kernel; it is given up."""
MIN_PAUSE_S = 0.0002


def children_of(pid: int) -> list[int]:
    """The direct children of `pid`, those of all its threads. Raises `OSError` if it is gone."""
    children: list[int] = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                children += map(int, file.read().split())
        except FileNotFoundError:
            if not os.path.exists(f"/proc/{pid}/task/{thread}"):  # the thread has ended
                continue
            return _children_by_parent(pid)
        except ProcessLookupError:
            continue
    return children


def _children_by_parent(pid: int) -> list[int]:
    """For kernels without the file `children`, like gVisor's."""
    children = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                with open(f"/proc/{name}/stat", "rb") as file:
                    parent = file.read().rpartition(b") ")[2].split()[1]
                if int(parent) == pid:
                    children.append(int(name))
    return children


def kill_strangers(keep: Container[int] = ()) -> int:
    """SIGKILL every child that is not in `keep` and, as they become children, all descendants.

    Only direct children are ever signalled: they stay ours until we reap them, so no process id can
    have been reused meanwhile. The caller must be a subreaper. Returns how many processes were
    killed. Raises `TimeoutError` naming those that are still there after `KILL_TIMEOUT_S`.
    """
    me = os.getpid()
    killed: set[int] = set()
    deadline = time.monotonic() + KILL_TIMEOUT_S
    pause_s = MIN_PAUSE_S
    while True:
        strangers = [pid for pid in children_of(me) if pid not in keep]
        if not strangers:
            return len(killed)
        alive = [pid for pid in strangers if not _reaped(pid)]
        for pid in alive:
            if pid not in killed:
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
                pause_s = MIN_PAUSE_S
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {strangers} are not gone after {KILL_TIMEOUT_S} s")
        if alive:
            time.sleep(pause_s)  # their end takes the kernel a moment; there is no event for all
            pause_s = min(pause_s * 2, 0.01)


def _reaped(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def kill_all_others() -> int:
    """SIGKILL and reap all of this pid namespace, as its pid 1. Returns how many were alive.

    Raises `TimeoutError` where that takes more than `KILL_TIMEOUT_S`.
    """
    for _ in reap():
        pass
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)  # in one go: nothing can fork past it
    deadline = time.monotonic() + KILL_TIMEOUT_S
    num = 0
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return num
        num += pid > 0
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes are not gone after {KILL_TIMEOUT_S} s")
        if pid == 0:
            time.sleep(MIN_PAUSE_S)


class Watch:
    """Waits for the end of children and for descriptors at a time, without polling.

    The last one made in a process works; a fork that goes on to be something else makes its own.
    """

    def __init__(self, *fds: int) -> None:
        self._wakeup, writer = os.pipe()
        os.set_blocking(self._wakeup, False)
        os.set_blocking(writer, False)
        _note_ends()
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._poll = select.poll()
        self._poll.register(self._wakeup, select.POLLIN)
        for fd in fds:
            self._poll.register(fd, select.POLLIN | select.POLLRDHUP)

    def wait(self) -> bool:
        """Block until a child ended or a descriptor has something; True: a descriptor has."""
        return bool(self.wait_any())

    def wait_any(self, timeout_s: float | None = None) -> set[int]:
        """The descriptors that have something; empty where a child ended, or in `timeout_s`."""
        timeout_ms = None if timeout_s is None else timeout_s * 1000
        ready = {fd for fd, _ in self._poll.poll(timeout_ms)}
        if self._wakeup in ready:
            ready.remove(self._wakeup)
            with contextlib.suppress(BlockingIOError):
                while len(os.read(self._wakeup, 4096)) == 4096:
                    pass
        return ready


def set_handler(signal_number: int, handler: Any) -> None:
    """`signal.signal`, without its detour by enums: each fork would pay for their pages."""
    getattr(signal.signal, "__wrapped__", signal.signal)(signal_number, handler)


@functools.cache
def _note_ends() -> None:
    """Once, for this process and its forks."""
    set_handler(signal.SIGCHLD, lambda *_: None)


def reap() -> Iterator[tuple[int, int]]:
    """(pid, wait status) of every child that has ended, reaping it."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, status


def reap_with_usage() -> Iterator[tuple[int, int, resource.struct_rusage]]:
    """Like `reap`, and what the child and those it waited for have used."""
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, status, usage


def exit_of(status: int) -> tuple[int | None, int | None]:
    """A wait status as (exit code, signal number); exactly one of them is None."""
    if os.WIFSIGNALED(status):
        return None, os.WTERMSIG(status)
    return os.WEXITSTATUS(status), None


def shell_code(status: int) -> int:
    """A wait status as the exit code that a shell makes of it: 128 + a signal's number."""
    code = os.waitstatus_to_exitcode(status)
    return 128 - code if code < 0 else code
