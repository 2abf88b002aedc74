"""The warm process of one agent: enclosed, then imports the agent's code once, then forks children.

What encloses it is the plan's stage `zygote`: the agent's code runs in here at import, before any
child is sealed. Its children inherit all of that and add their own.

Invariants: single-threaded, unless the agent's module starts threads on import (reported); reads no
request and holds no key; every descriptor that comes with an order is closed right after the fork,
but for the one by which it reports an end.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

from . import density, forking, kernel, reaper
from .child import agent_traceback, run_agent, seal
from .errors import TargetError
from .init import run_init
from .interpreter import enter_environment, interpreter_paths
from .layers import Context
from .layers.scratch import BOX
from .plan import Plan, Step, apply, prepare
from .target import Program, import_error, load_target
from .warmup import rehearse, stub_listener, warm_up, warm_up_imported
from .wire import (
    MAX_DESCRIPTORS,
    MAX_LINE_CHARS,
    MAX_ORDER_BYTES,
    MAX_TEXT_CHARS,
    Descriptors,
    Exit,
    Status,
    encode_exit,
    encode_status,
    shorten,
)

# The order in which an init of a cell hands them over.
_DOORS = (
    kernel.CLONE_NEWUSER,
    kernel.CLONE_NEWPID,
    kernel.CLONE_NEWNS,
    kernel.CLONE_NEWNET,
    kernel.CLONE_NEWIPC,
    kernel.CLONE_NEWUTS,
)


def run(settings: Mapping[str, Any], channel: socket.socket) -> NoReturn:
    """In a fork of the guardian or the keeper. Never returns."""
    code = 1
    forking.prepare()
    try:
        kernel.set_name("sandbox-zygote")
        made: Plan = settings["plan"]
        in_cells = bool(made.root)
        listener = stub_listener()
        context = Context(
            folder=settings["folder"],
            ports=[listener.getsockname()[1]],
            readable=interpreter_paths(),
            group=list(settings["group"]),
        )
        if in_cells:
            os.environ.update(HOME=f"{BOX}/home", TMPDIR=f"{BOX}/tmp")
            os.chdir(f"{BOX}/work")
        apply(made.zygote, context)
        prepare(made.child)
        with listener:
            target = _prepare(settings, channel, listener)
        if target is not None:
            (_serve_cells if in_cells else _serve)(target, made, channel)
            code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _prepare(
    settings: Mapping[str, Any], channel: socket.socket, listener: socket.socket
) -> Any | None:
    """Warm up, resolve the target, say so. None: the target could not be resolved."""
    is_program = not settings["target"] and not settings["pickled"]
    notes: list[str] = []
    try:
        if is_program:
            target: Any = Program()
        else:
            os.environ.update(settings["env"])
            enter_environment()
            sys.path[:0] = settings["python_path"]
            notes += warm_up(listener)
            target = load_target(settings["target"], settings["pickled"])
            notes += warm_up_imported(listener)
    except BaseException as error:
        message = {
            "error": shorten(import_error(error), MAX_LINE_CHARS),
            "traceback": ""
            if isinstance(error, TargetError)
            else shorten(agent_traceback(error), MAX_TEXT_CHARS),
        }
        channel.send(json.dumps(message).encode())
        return None
    density.settle()
    if not is_program:
        rehearse(listener)
    # Last: what is written to while forks share it leaves its huge page.
    kernel.collapse_private_memory()
    num_threads = len(os.listdir("/proc/self/task"))
    channel.send(json.dumps({"ready": True, "num_threads": num_threads, "notes": notes}).encode())
    return target


def _serve_cells(target: Any, made: Plan, channel: socket.socket) -> None:
    """Fork an agent's process into each cell that comes, until the channel ends."""
    watch = reaper.Watch(channel.fileno())
    tells: dict[int, int] = {}  # agent's process id → where its end is told
    while True:
        ordered = watch.wait()
        for pid, wait_status, usage in reaper.reap_with_usage():
            if (tell := tells.pop(pid, None)) is None:
                continue
            exit_code, signal_number = reaper.exit_of(wait_status)
            cpu_s = usage.ru_utime + usage.ru_stime
            _tell(tell, Exit(exit_code, signal_number, cpu_s, usage.ru_maxrss * 1024))
        if not ordered:
            continue
        most = len(_DOORS) + 1 + MAX_DESCRIPTORS  # the control connection stays with the init
        message, received, _, _ = socket.recv_fds(channel, MAX_ORDER_BYTES, most)
        if not message:
            return
        doors, (tell, failures, *for_agent) = received[: len(_DOORS)], received[len(_DOORS) :]
        request, stdout, stderr, result, *group = for_agent
        context = Context(
            folder=BOX, stdout=stdout, stderr=stderr, result=result, request=request, group=group
        )
        try:
            kernel.enter(doors[1], kernel.CLONE_NEWPID)  # for the next fork
            pid = forking.fork(partial(_enclose, doors, made.child, context, failures))
        except OSError as error:
            _tell(tell, Exit(error=f"cannot enter the cell: {error}"))
        else:
            if pid == 0:
                run_agent(target, context, failures)
            tells[pid] = tell
        for fd in (*doors, failures, *for_agent):
            os.close(fd)


def _enclose(doors: list[int], steps: Sequence[Step], context: Context, failures: int) -> None:
    _enter(doors, failures)
    seal(steps, context, failures)


def _enter(doors: list[int], failures: int) -> None:
    try:
        for fd, kind in zip(doors, _DOORS):
            if kind != kernel.CLONE_NEWPID:
                kernel.enter(fd, kind)
    except BaseException as error:
        os.write(failures, f"enter\n{error}".encode()[:4096])
        os._exit(1)


def _tell(fd: int, end: Exit) -> None:
    with contextlib.suppress(OSError):
        os.write(fd, encode_exit(end))
    os.close(fd)


def _serve(target: Any, made: Plan, channel: socket.socket) -> None:
    """Fork an init per order until the channel ends."""
    watch = reaper.Watch(channel.fileno())
    import_time = set(reaper.children_of(os.getpid()))  # helpers that the agent's module started
    controls: dict[int, socket.socket] = {}  # init's pid → its control connection
    while True:
        ordered = watch.wait()
        for pid, wait_status in reaper.reap():
            control = controls.pop(pid, None)
            if control is None:
                continue
            if wait_status != 0:
                _clear_after(control, wait_status, import_time | controls.keys())
            control.close()
        if not ordered:
            continue
        message, received, _, _ = socket.recv_fds(channel, MAX_ORDER_BYTES, MAX_DESCRIPTORS)
        if not message:
            return
        fds = Descriptors.of(received)
        control = socket.socket(fileno=os.dup(fds.control))
        try:
            pid = os.fork()
        except OSError as error:
            control.send(encode_status(Status(failed_step="fork", error=str(error))))
            control.close()
        else:
            if pid == 0:
                run_init(target, made, json.loads(message)["folder"], fds)
            controls[pid] = control
        for fd in received:
            os.close(fd)


def _clear_after(control: socket.socket, wait_status: int, keep: set[int]) -> None:
    """An init ended before its work was done (the agent killed it): its orphans are ours now."""
    error = "the child's init was killed"
    num_killed = 0
    try:
        num_killed = reaper.kill_strangers(keep)
    except TimeoutError as failure:
        error = f"{error}; {failure}"
    exit_code, signal_number = reaper.exit_of(wait_status)
    status = Status(exit_code=exit_code, signal=signal_number, num_killed=num_killed, error=error)
    with contextlib.suppress(OSError):
        control.send(encode_status(status))
