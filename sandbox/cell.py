"""A cell: the namespaces of one child, and their pid 1, which runs none of the agent's code.

The init makes the cell's files, network and listeners, hands both out (the listeners to whoever
ordered the child, the namespaces to the zygote, which forks the agent's process into them), and
waits: for the agent's end, told by the zygote, or for the end of the control connection. Then it
kills whatever is left in the cell, sends the `Status`, and ends, and the kernel ends the cell.

The zygote may be hostile, for it imported the agent's code: what it says of the child's end is
bounded and checked, and concerns that child alone.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import resource
import select
import signal
import socket
import time
import traceback
from collections.abc import Mapping
from typing import NoReturn

from . import kernel, outputs, reaper
from .errors import StepFailed
from .layers import Context, polled_limits
from .layers.root import INSIDE_ID
from .layers.scratch import BOX, TERMINALS
from .plan import Plan, apply
from .wire import (
    CHILD_READY,
    MAX_STATUS_BYTES,
    Descriptors,
    Exit,
    Status,
    decode_exit,
    encode_exit,
    encode_status,
    one_line,
)

NAMESPACES = ("user", "pid", "mnt", "net", "ipc", "uts")
KILL_TIMEOUT_S = 5.0
FILES_TIMEOUT_S = 2.0
"""Nobody waits for it."""


def report_failure(control_fd: int, step: str, error: str) -> None:
    _report(control_fd, Status(failed_step=step, error=error))


def report_killed(control_fd: int, wait_status: int) -> None:
    exit_code, signal_number = reaper.exit_of(wait_status)
    error = "the child's init was killed"
    _report(control_fd, Status(exit_code=exit_code, signal=signal_number, error=error))


def _report(control_fd: int, status: Status) -> None:
    """The last that is said: ends the connection, of which the keeper holds a copy."""
    # Whoever wanted to know may be gone.
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(control_fd)) as control:
        control.send(encode_status(status))
        control.shutdown(socket.SHUT_RDWR)


def run_init(made: Plan, fds: Descriptors, to_zygote: socket.socket) -> NoReturn:
    """In a fresh process that is pid 1 of its own namespaces. Never returns."""
    code = 1
    try:
        gc.disable()  # it would visit, so copy, what is shared with the keeper
        signal.set_wakeup_fd(-1)  # the keeper's
        kernel.map_user("self", INSIDE_ID, INSIDE_ID, INSIDE_ID)
        own = {fds.control, fds.request, fds.stdout, fds.stderr, fds.result, to_zygote.fileno()}
        kernel.close_all_descriptors_but({0, 1, 2, *own, *fds.group})
        context = Context()
        try:
            apply(made.cell, context)
        except StepFailed as error:
            report_failure(fds.control, error.step, error.reason)
        else:
            _serve(fds, to_zygote, context)
        code = 0
    except BaseException:
        traceback.print_exc()  # to the zygote's own stderr
    finally:
        os._exit(code)


def _serve(fds: Descriptors, to_zygote: socket.socket, context: Context) -> None:
    control = socket.socket(fileno=fds.control)
    exited, tell_exit = os.pipe()
    failures, tell_failure = os.pipe()
    doors = [os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name in NAMESPACES]
    for_agent = [tell_failure, fds.request, fds.stdout, fds.stderr, fds.result, *fds.group]
    handed = [*doors, tell_exit, *for_agent]
    socket.send_fds(to_zygote, [b"fork"], handed)
    to_zygote.close()
    for fd in handed:
        os.close(fd)
    socket.send_fds(control, [CHILD_READY], context.listeners)
    for listener in context.listeners:
        os.close(listener)
    kernel.set_name("sandbox-init")
    _try_the_end()

    stopped_by, order = _until_over(control, exited, context.polled)
    num_killed, error = _clear()
    agent = _read_exit(exited, KILL_TIMEOUT_S)
    if agent is None:
        return  # without a status: the child is lost
    if stopped_by and num_killed:
        num_killed -= 1  # the agent's own process was among them
    failed_step, _, reason = _read_available(failures).partition("\n")
    orphans = resource.getrusage(resource.RUSAGE_CHILDREN)
    status = Status(
        exit_code=agent.exit_code,
        signal=agent.signal,
        cpu_s=agent.cpu_s + orphans.ru_utime + orphans.ru_stime,
        max_rss_bytes=max(agent.max_rss_bytes, orphans.ru_maxrss * 1024),
        num_killed=num_killed,
        written_bytes=_written_bytes(),
        limit=stopped_by if stopped_by != _ORDERED else "",
        failed_step=one_line(failed_step) or ("enter" if agent.error else ""),
        error=reason or agent.error or error,
    )
    if not order:
        _report(control.fileno(), status)
    else:
        with contextlib.suppress(OSError):  # whoever wanted to know may be gone
            control.send(encode_status(status))  # first: whatever becomes of the outputs
            _send_outputs(control, order)
            control.shutdown(socket.SHUT_RDWR)
    if not error:
        _drop_files()


def _drop_files() -> None:
    """Take the child's files out of memory, whoever still has a door to its namespaces. Not those
    that somebody has open: no process of the child's is left, so it would be the zygote."""
    os.chdir("/")
    with contextlib.suppress(OSError):  # there are none
        kernel.unmount(TERMINALS)
    deadline = time.monotonic() + FILES_TIMEOUT_S
    while True:
        try:
            kernel.unmount(BOX, flags=0)
            return
        except OSError as failure:
            if failure.errno != errno.EBUSY or time.monotonic() > deadline:
                return
        # Those in flight between sockets that are gone are closed when the next one is.
        for one in socket.socketpair():
            one.close()
        time.sleep(0.01)


def _try_the_end() -> None:
    """What is done at the end, for nothing: its pages are touched while nobody waits for it."""
    _num_others()
    resource.getrusage(resource.RUSAGE_CHILDREN)
    encode_status(Status(written_bytes=_written_bytes()))
    decode_exit(encode_exit(Exit()))


def _send_outputs(control: socket.socket, order: bytes) -> None:
    try:
        packed = outputs.collect(BOX, "work", outputs.Order.decode(order))
    except (OSError, ValueError) as error:
        control.send(outputs.COLLECTED + f"\n{error}".encode()[:MAX_STATUS_BYTES])
    else:
        socket.send_fds(control, [outputs.COLLECTED], [packed.fd])


def _written_bytes() -> int:
    files = os.statvfs(BOX)
    return (files.f_blocks - files.f_bfree) * files.f_frsize


_ORDERED = "ordered"


def _until_over(
    control: socket.socket, exited: int, limits: Mapping[str, float]
) -> tuple[str, bytes]:
    """ "": the agent's process ended. Else why it has to: `_ORDERED`, or the limit it is over. And
    the order for outputs, which comes before the agent's request; b"" where none came.
    """
    order = b""
    watch = reaper.Watch(control.fileno(), exited)
    look_at = time.monotonic() + polled_limits.INTERVAL_S
    while True:
        ready = watch.wait_any(max(0.0, look_at - time.monotonic()))
        for _ in reaper.reap():
            pass
        if control.fileno() in ready:
            message = _receive(control)
            order = message or order
            if message == b"" and exited not in ready:
                return _ORDERED, order
        if exited in ready:
            return "", order
        if time.monotonic() >= look_at:
            if limit := polled_limits.exceeded(limits):
                return limit, order
            look_at = time.monotonic() + polled_limits.INTERVAL_S


def _receive(control: socket.socket) -> bytes:
    """A message, or b"" where the connection has ended."""
    try:
        return control.recv(outputs.MAX_ORDER_BYTES)
    except OSError:
        return b""


def _clear() -> tuple[int, str]:
    """Kill all other processes of this pid namespace. Returns how many there were, and an error."""
    for _ in reaper.reap():
        pass
    num_left = _num_others()
    try:
        os.kill(-1, signal.SIGKILL)  # in one go: nothing can fork past it
    except ProcessLookupError:
        return 0, ""
    deadline = time.monotonic() + KILL_TIMEOUT_S
    pause_s = reaper.MIN_PAUSE_S
    while reaper.children_of(1):
        for _ in reaper.reap():
            pass
        if time.monotonic() > deadline:
            return num_left, f"processes are not gone after {KILL_TIMEOUT_S} s"
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.01)
    return num_left, ""


def _num_others() -> int:
    return sum(name.isdigit() and name != "1" for name in os.listdir("/proc"))


def _read_exit(exited: int, timeout_s: float) -> Exit | None:
    """None: the zygote has ended."""
    told = select.poll()
    told.register(exited, select.POLLIN)
    if not told.poll(1000 * timeout_s):
        return Exit(error="the zygote did not tell how the child ended")
    said = os.read(exited, MAX_STATUS_BYTES)
    return decode_exit(said) if said else None


def _read_available(fd: int) -> str:
    os.set_blocking(fd, False)
    try:
        return os.read(fd, 4096).decode(errors="replace")
    except BlockingIOError:
        return ""
