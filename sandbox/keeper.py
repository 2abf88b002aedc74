"""The trusted process inside an agent's namespaces: their pid 1. Makes a cell per child.

It builds the root, then forks the zygote, which encloses itself and imports the agent, and from
then on forks a small init into fresh namespaces per order (`cell`). It runs none of the agent's
code, so what a cell is does not depend on what the agent's import may have done to the zygote.

Invariants: single-threaded; holds no request and no key; when it ends, the kernel ends the zygote
and every cell.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from typing import Any, NoReturn

from . import cell, density, kernel, reaper, zygote
from .interpreter import interpreter_paths
from .layers import Context
from .layers.root import INSIDE_ID
from .plan import Plan, apply
from .wire import MAX_DESCRIPTORS, MAX_ORDER_BYTES, MAX_READY_BYTES, Descriptors

NOBODY = 65534


def start(settings: dict[str, Any], channel: socket.socket, lifeline: socket.socket) -> int:
    """In the guardian: the keeper's process id, once its user is mapped. Raises `OSError`."""
    uid, gid = os.getuid(), os.getgid()
    if uid == 0:  # in there, root would still be the owner of every file of root's
        os.setgroups([])
        uid = gid = NOBODY
    mapped, tell = os.pipe()
    pid = kernel.fork_into(kernel.ALL_NAMESPACES)
    if pid == 0:
        os.close(tell)
        lifeline.close()
        _run(settings, channel, mapped)
    os.close(mapped)
    try:
        kernel.map_user(pid, INSIDE_ID, uid, gid)
    finally:
        os.close(tell)
    return pid


def _run(settings: dict[str, Any], channel: socket.socket, mapped: int) -> NoReturn:
    code = 1
    try:
        os.read(mapped, 1)
        os.close(mapped)
        made: Plan = settings["plan"]
        paths = interpreter_paths()
        apply(made.root, Context(folder=settings["folder"], readable=paths))
        kernel.set_dumpable(True)  # changing users hid /proc/self from its owner
        kernel.die_with_parent(signal.SIGKILL)
        kernel.set_name("sandbox-keeper")
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            near.close()
            channel.close()
            zygote.run(settings, far)
        far.close()
        for fd in settings["group"]:
            os.close(fd)
        # Each init is a fork of this process: what is not visited stays shared with it.
        density.settle()
        kernel.collapse_private_memory()
        code = _keep(made, pid, channel, near)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _keep(made: Plan, zygote_pid: int, channel: socket.socket, to_zygote: socket.socket) -> int:
    """Serve orders until the channel or the zygote ends. Returns the exit code."""
    watch = reaper.Watch(channel.fileno())
    ready = to_zygote.recv(MAX_READY_BYTES)
    if not ready:  # it has ended, perhaps before there was a watch
        return reaper.shell_code(os.waitpid(zygote_pid, 0)[1])
    channel.send(ready)
    controls: dict[int, int] = {}  # init's process id → its control connection
    while True:
        ordered = watch.wait()
        for pid, wait_status in reaper.reap():
            if pid == zygote_pid:
                return reaper.shell_code(wait_status)
            if (control := controls.pop(pid, None)) is not None:
                if wait_status != 0:  # the kernel has killed the rest of its cell by now
                    cell.report_killed(control, wait_status)
                os.close(control)
        if not ordered:
            continue
        message, received, _, _ = socket.recv_fds(channel, MAX_ORDER_BYTES, MAX_DESCRIPTORS)
        if not message:
            return 0
        fds = Descriptors.of(received)
        try:
            pid = kernel.fork_into(kernel.ALL_NAMESPACES)
        except OSError as error:
            cell.report_failure(fds.control, "namespaces", str(error))
        else:
            if pid == 0:
                cell.run_init(made, fds, to_zygote)
            controls[pid] = os.dup(fds.control)
        for fd in received:
            os.close(fd)
