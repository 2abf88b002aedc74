"""One child, from fork to end: its init, and the process that runs the agent's code.

The zygote forks the init; the init forks the agent process, waits for its end or for the end of the
control connection (whoever ordered the child wants it dead, or is dead), kills everything that
descends from it, and sends the `Status`. The init runs no code of the agent's and is the one place
that becomes pid 1 where a tier has a pid namespace.

Invariants: the request (data, variables, so keys too) is read after the fork and never enters the
zygote's memory; the agent process runs only after every step of the plan was applied.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from . import kernel, reaper
from .errors import StepFailed
from .folders import make_private, remove_tree
from .layers import Context
from .layers.context import RESULT_FD
from .plan import Step, apply
from .target import bind
from .wire import MAX_LINE_CHARS, Status, encode_error, encode_status, encode_value, shorten

SETUP_FAILED_CODE = 125
"""Exit code of an agent process that could not be set up (its reason goes by a pipe)."""
_PACKAGE_FOLDER = os.path.dirname(os.path.abspath(__file__))


@dataclass(frozen=True)
class Descriptors:
    """What comes with an order for a child, in this order."""

    control: int
    """Seqpacket socket: its end-of-file ends the child; the status goes out by it."""
    request: int
    """File with the request's JSON: `{"data", "kwargs", "env", "folder"}`."""
    stdout: int
    stderr: int
    result: int


def run_init(target: Any, steps: Sequence[Step], fds: Descriptors) -> NoReturn:
    """In a fresh fork of the zygote. Never returns."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)  # the zygote's
        own = {fds.control, fds.request, fds.stdout, fds.stderr, fds.result}
        kernel.close_all_descriptors_but({0, 1, 2} | own)
        os.setsid()
        kernel.become_subreaper()
        kernel.set_name("sandbox-init")
        control = socket.socket(fileno=fds.control)
        with open(fds.request, "rb") as file:
            request = json.load(file)
        try:
            make_private(request["folder"])
            status = _run_and_clear(target, steps, request, fds)
        except OSError as error:
            status = Status(failed_step="init", error=str(error))
        with contextlib.suppress(OSError):  # whoever wanted to know may be gone
            control.send(encode_status(status))
        remove_tree(request["folder"])
        code = 0
    except BaseException:
        traceback.print_exc()  # to the zygote's own stderr
    finally:
        os._exit(code)


def _run_and_clear(
    target: Any, steps: Sequence[Step], request: dict[str, Any], fds: Descriptors
) -> Status:
    watch = reaper.Watch(fds.control)
    failures, failure_writer = os.pipe()
    agent = os.fork()
    if agent == 0:
        context = Context(
            folder=request["folder"],
            env=request["env"],
            stdout=fds.stdout,
            stderr=fds.stderr,
            result=fds.result,
            keep=failure_writer,
        )
        _run_agent(target, steps, request, context)
    # Only the agent's processes hold these now: their end-of-file is the agent's.
    for fd in (fds.stdout, fds.stderr, fds.result, failure_writer):
        os.close(fd)

    ended: int | None = None
    while ended is None:
        stop = watch.wait()
        for pid, wait_status in reaper.reap():
            if pid == agent:
                ended = wait_status
        if ended is None and stop:
            os.kill(agent, signal.SIGKILL)
            _, ended = os.waitpid(agent, 0)

    error = ""
    num_killed = 0
    try:
        num_killed = reaper.kill_strangers()
    except TimeoutError as failure:
        error = str(failure)
    failed_step, _, reason = os.read(failures, 4096).decode(errors="replace").partition("\n")
    exit_code, signal_number = reaper.exit_of(ended)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Status(
        exit_code=exit_code,
        signal=signal_number,
        cpu_s=usage.ru_utime + usage.ru_stime,
        max_rss_bytes=usage.ru_maxrss * 1024,
        num_killed=num_killed,
        failed_step=failed_step,
        error=reason or error,
    )


def _run_agent(
    target: Any, steps: Sequence[Step], request: dict[str, Any], context: Context
) -> NoReturn:
    code = SETUP_FAILED_CODE
    try:
        try:
            apply(steps, context)
            kernel.set_name("sandbox-child")
        except Exception as error:
            step = error.step if isinstance(error, StepFailed) else "apply"
            reason = error.reason if isinstance(error, StepFailed) else str(error)
            os.write(context.keep, f"{step}\n{shorten(reason, MAX_LINE_CHARS)}".encode()[:4096])
            os._exit(SETUP_FAILED_CODE)
        os.close(context.keep)
        code = _run_target(target, request["kwargs"], request["data"])
    finally:
        os._exit(code)


def _run_target(target: Any, kwargs: dict[str, Any], data: Any) -> int:
    """Run the agent and send its result message. Returns the exit code of the process."""
    code = 0
    try:
        value = bind(target, kwargs)(data)
        if inspect.isawaitable(value):
            import asyncio

            value = asyncio.run(_awaited(value))
        message = encode_value(value)
    except SystemExit as error:
        _flush()
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        message = encode_error(error, agent_traceback(error))
        code = 1
    _flush()
    _write_all(RESULT_FD, message)
    return code


async def _awaited(value: Any) -> Any:
    return await value


def agent_traceback(error: BaseException) -> str:
    """The traceback from the agent's first frame on, without what led there."""
    shown = tb = error.__traceback__
    while tb is not None:
        if tb.tb_frame.f_code.co_filename.startswith(_PACKAGE_FOLDER):
            shown = tb.tb_next
        tb = tb.tb_next
    try:
        return "".join(traceback.format_exception(type(error), error, shown))
    except Exception:  # its `__str__` is the agent's code, too
        return f"{type(error).__name__} (its traceback cannot be shown)\n"


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def _write_all(fd: int, message: bytes) -> None:
    view = memoryview(message)
    while view:
        view = view[os.write(fd, view) :]
