"""A sealed child that became a fresh interpreter: imports the agent itself, then runs it once.

For those whose agents must not even share what their import leaves behind (`start="exec"`): their
zygote never sees the agent's code. Executed by `child`, in the place of the agent's process.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, NoReturn

from . import kernel
from .child import agent_traceback, run_target
from .errors import TargetError
from .layers.context import RESULT_FD
from .target import import_error, load_target
from .wire import MAX_LINE_CHARS, MAX_TEXT_CHARS, encode_value, shorten, write_all


def main(request_fd: int) -> NoReturn:
    """The request: `target` or `pickled`, `python_path`, `kwargs`, `data`; with `only_import`, the
    agent is not run. Returns in no process."""
    code = 1
    try:
        os.set_inheritable(RESULT_FD, False)
        kernel.set_name("sandbox-child")
        with open(request_fd, "rb") as file:
            request: dict[str, Any] = json.load(file)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
        sys.path[:0] = request["python_path"]
        target = _load(request)
        if request["only_import"]:
            write_all(RESULT_FD, encode_value(None))
            code = 0
        else:
            code = run_target(target, request["kwargs"], request["data"])
    finally:
        os._exit(code)


def _load(request: dict[str, Any]) -> Any:
    try:
        return load_target(request["target"], request["pickled"])
    except BaseException as error:
        line = f"cannot import the agent {request['label']!r}: {import_error(error)}"
        message = {
            "error": shorten(line, MAX_LINE_CHARS),
            "traceback": ""
            if isinstance(error, TargetError)
            else shorten(agent_traceback(error), MAX_TEXT_CHARS),
        }
        sys.stdout.flush()
        sys.stderr.flush()
        write_all(RESULT_FD, json.dumps(message).encode())
        os._exit(1)
