"""The process between zygote and agent in the tiers `process` and `gvisor`: ends all of its child.

A subreaper: whatever the agent's processes do, their orphans become its children. (In gVisor it is
pid 1 of their pid namespace instead.) It waits for the agent's end or for the end of the control
connection (whoever ordered the child wants it dead, or is dead), kills everything that descends
from it, and sends the `Status`. It runs no code of the agent's. Where there is a keeper, `cell`
does this.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import traceback
from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

from . import forking, kernel, reaper
from .child import run_agent, seal
from .errors import StepFailed
from .folders import bytes_of, make_private, remove_tree
from .interpreter import interpreter_paths
from .layers import Context
from .outputs import MAX_ORDER_BYTES
from .plan import Plan, apply
from .wire import CHILD_READY, Descriptors, Status, encode_status


def run_init(target: Any, made: Plan, folder: str, fds: Descriptors) -> NoReturn:
    """In a fresh fork of the zygote. Never returns."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)  # the zygote's
        own = {fds.control, fds.request, fds.stdout, fds.stderr, fds.result}
        kernel.close_all_descriptors_but({0, 1, 2, *own, *fds.group})
        os.setsid()
        if not made.cell:
            kernel.become_subreaper()
        kernel.set_name("sandbox-init")
        control = socket.socket(fileno=fds.control)
        around = Context()
        try:
            apply(made.cell, around)
            if made.cell:
                _become_pid_1()
            make_private(folder)
            listeners = around.listeners
            status, order = _run_and_clear(target, made, folder, fds, control, listeners)
        except StepFailed as error:
            status, order = Status(failed_step=error.step, error=error.reason), b""
        except OSError as error:
            status, order = Status(failed_step="init", error=str(error)), b""
        with contextlib.suppress(OSError):  # whoever wanted to know may be gone
            control.send(encode_status(status))
        if not order:  # else its outputs are collected by whoever ordered them, who removes it
            remove_tree(folder)
        code = 0
    except BaseException:
        traceback.print_exc()  # to the zygote's own stderr
    finally:
        os._exit(code)


def _become_pid_1() -> None:
    """Go on as the first process of the pid namespace that was made for the next one forked."""
    pid = os.fork()
    if pid == 0:
        return
    kernel.close_all_descriptors_but({0, 1, 2})  # the end of the control connection is its own
    os._exit(reaper.shell_code(os.waitpid(pid, 0)[1]))


def _run_and_clear(
    target: Any,
    made: Plan,
    folder: str,
    fds: Descriptors,
    control: socket.socket,
    listeners: Sequence[int],
) -> tuple[Status, bytes]:
    """The status, and the order for outputs; b"" where none came."""
    watch = reaper.Watch(fds.control)
    failures, failure_writer = os.pipe()
    context = Context(
        folder=folder,
        stdout=fds.stdout,
        stderr=fds.stderr,
        result=fds.result,
        request=fds.request,
        readable=interpreter_paths(),
        group=list(fds.group),
    )
    agent = forking.fork(partial(seal, made.child, context, failure_writer))
    if agent == 0:
        run_agent(target, context, failure_writer)
    # Only the agent's processes hold these now: their end-of-file is the agent's.
    for fd in (fds.stdout, fds.stderr, fds.result, fds.request, failure_writer, *fds.group):
        os.close(fd)
    with contextlib.suppress(OSError):
        socket.send_fds(control, [CHILD_READY], listeners)
    for listener in listeners:
        os.close(listener)

    order = b""
    ended: int | None = None
    while ended is None:
        stop = False
        if watch.wait():
            message = _receive(control)
            order, stop = message or order, not message
        for pid, wait_status in reaper.reap():
            if pid == agent:
                ended = wait_status
        if ended is None and stop:
            os.kill(agent, signal.SIGKILL)
            _, ended = os.waitpid(agent, 0)

    error = ""
    num_killed = 0
    try:
        num_killed = reaper.kill_all_others() if made.cell else reaper.kill_strangers()
    except TimeoutError as failure:
        error = str(failure)
    failed_step, _, reason = os.read(failures, 4096).decode(errors="replace").partition("\n")
    exit_code, signal_number = reaper.exit_of(ended)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    status = Status(
        exit_code=exit_code,
        signal=signal_number,
        cpu_s=usage.ru_utime + usage.ru_stime,
        max_rss_bytes=usage.ru_maxrss * 1024,
        num_killed=num_killed,
        written_bytes=bytes_of(folder),
        failed_step=failed_step,
        error=reason or error,
    )
    return status, order


def _receive(control: socket.socket) -> bytes:
    """The order for outputs, or b"" where the connection has ended: the child has to, too."""
    try:
        return control.recv(MAX_ORDER_BYTES)
    except OSError:
        return b""
