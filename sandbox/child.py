"""The process that becomes the agent: sealed step by step, then handed its request, then run.

It waits sealed: the request (data, variables, so keys too) comes through a socket when there is
one, so it never enters the zygote's memory, and a child can stand ready before it is needed.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from . import kernel, rehearsal
from .boot import boot_command
from .errors import StepFailed
from .interpreter import check_environment
from .layers import Context
from .layers.context import RESULT_FD
from .plan import Step, apply
from .target import Program, bind
from .unpacking import unpack, why_not_unpacked
from .wire import MAX_LINE_CHARS, encode_error, encode_value, shorten, write_all

SETUP_FAILED_CODE = 125
"""Exit code of an agent process that could not be set up (its reason goes by a pipe)."""
NOT_EXECUTABLE_CODE, NOT_FOUND_CODE = 126, 127
"""Exit codes, as a shell's, where there is no such program."""
_PACKAGE_FOLDER = os.path.dirname(os.path.abspath(__file__))


def seal(steps: Sequence[Step], context: Context, failures: int) -> None:
    """Apply `steps`; ends the process where one fails. `failures`: the pipe that tells which."""
    try:
        context.keep.append(failures)
        apply(steps, context)
        kernel.set_name("sandbox-child")
    except Exception as error:
        step = error.step if isinstance(error, StepFailed) else "apply"
        _fail(failures, step, error.reason if isinstance(error, StepFailed) else str(error))


def run_agent(target: Any, context: Context, failures: int) -> NoReturn:
    """In a process that is sealed: wait for the request, run `target`."""
    code = SETUP_FAILED_CODE
    try:
        rehearsal.copy_ahead(context.request)
        request, workspace = _receive(context.request)
        if request is None:
            os._exit(0)  # nobody needs this child any more
        if workspace is not None:
            try:
                unpack(workspace)
            except Exception as error:
                _fail(failures, "workspace", why_not_unpacked(error))
            os.close(workspace)
        os.environ.update(request["env"])
        try:
            _write_files(request)
        except OSError as error:
            _fail(failures, "files", why_not_unpacked(error))
        os.close(failures)
        if not isinstance(target, Program):
            code = run_target(target, request["kwargs"], request["data"])
        elif "argv" in request:
            code = _execute(request)
        else:
            _execute_interpreter(request)
    finally:
        os._exit(code)


def _fail(failures: int, step: str, reason: str) -> NoReturn:
    line = shorten(reason, MAX_LINE_CHARS)
    os.write(failures, f"{step}\n{line}".encode("utf-8", "backslashreplace")[:4096])
    os._exit(SETUP_FAILED_CODE)


def _receive(fd: int) -> tuple[dict[str, Any] | None, int | None]:
    """The request: JSON in a file whose descriptor is sent. None: nobody will send one. And the
    descriptor of the workspace's archive, where there is one.

    `{"data", "kwargs", "env"}`; `{"argv", "env", "stdin", "files"}` for a program; for a fresh
    interpreter see `runner`.
    """
    with socket.socket(fileno=fd) as sender:
        _, received, _, _ = socket.recv_fds(sender, 16, 2)
    if not received:
        return None, None
    with open(received[0], "rb") as file:
        request: dict[str, Any] = json.load(file)
    return request, received[1] if len(received) > 1 else None


def _write_files(request: Mapping[str, Any]) -> None:
    """Those of a program, its standard input among them. Raises `OSError`."""
    for path, content in request.get("files", {}).items():
        if path.startswith("~/"):
            path = os.path.join(os.environ["HOME"], path[2:])
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "wb") as file:
            file.write(os.fsencode(content))
    if request.get("stdin"):
        os.dup2(_scratch_file(os.fsencode(request["stdin"])), 0)


def _execute(request: Mapping[str, Any]) -> int:
    argv: list[str] = request["argv"]
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # which Python ignores; ignoring is inherited
    try:
        os.execvpe(argv[0], argv, os.environ)
    except OSError as error:
        sys.stderr.write(f"cannot execute {argv[0]!r}: {error.strerror}\n")
        _flush()
        return NOT_FOUND_CODE if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE_CODE


def _execute_interpreter(request: Mapping[str, Any]) -> NoReturn:
    """Become a fresh interpreter that imports the agent itself: see `runner`."""
    try:
        check_environment()
        fd = _scratch_file(json.dumps(request).encode())
        os.set_inheritable(fd, True)
        os.set_inheritable(RESULT_FD, True)
        command = boot_command(sys.executable, request["label"], "runner", [fd], site=True)
        os.execv(sys.executable, command)
    except OSError as error:
        write_all(RESULT_FD, encode_error(error, ""))
        os._exit(1)


def _scratch_file(content: bytes) -> int:
    """A descriptor of an unnamed file among the child's own that holds `content`."""
    path = os.path.join(os.environ["TMPDIR"], f".request-{os.getpid()}")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(path)
    write_all(fd, content)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def run_target(target: Any, kwargs: dict[str, Any], data: Any) -> int:
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
    write_all(RESULT_FD, message)
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
