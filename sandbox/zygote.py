"""The warm process of one agent: imports its code once, then forks a child per order.

    whoever runs children ── exec ──► guardian ── fork ──► zygote ── fork ──► init ── fork ──► agent

The guardian runs nothing of the agent's: it waits for its lifeline's end-of-file or the zygote's
end, then kills everything below it. So whatever import-time code does, closing one socket (or
dying) ends it all.

Invariants: started by exec with a clean environment; single-threaded, unless the agent's module
starts threads on import (reported); reads no request and holds no key; every descriptor that comes
with an order is closed right after the fork, but for the control connection, by which the zygote
reports the end of an init that could not do so itself.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Mapping
from typing import Any, NoReturn

from . import kernel, plan, reaper
from .child import Descriptors, agent_traceback, run_init
from .errors import TargetError
from .target import resolve
from .warmup import warm_up
from .wire import MAX_LINE_CHARS, MAX_TEXT_CHARS, Status, encode_status, shorten

MAX_ORDER_BYTES = 4096


def main(channel_fd: int, lifeline_fd: int) -> NoReturn:
    """The exec'd program: settings as JSON on stdin. Returns in no process.

    Settings: `target` or `pickled` (base64 of dill), `python_path`, `steps` (the plan's JSON).
    """
    kernel.become_subreaper()
    zygote = os.fork()
    if zygote:
        os.close(channel_fd)
        kernel.set_name("sandbox-guard")
        os._exit(_guard(zygote, socket.socket(fileno=lifeline_fd)))
    code = 1
    try:
        os.close(lifeline_fd)
        kernel.die_with_parent(signal.SIGKILL)
        kernel.set_name("sandbox-zygote")
        kernel.become_subreaper()  # not inherited
        channel = socket.socket(fileno=channel_fd)
        with open(0, "rb") as file:
            settings = json.load(file)
        os.open(os.devnull, os.O_RDONLY)  # becomes descriptor 0
        if _prepare(settings, channel):
            code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _guard(zygote: int, lifeline: socket.socket) -> int:
    watch = reaper.Watch(lifeline.fileno())
    ended: int | None = None
    while ended is None:
        stop = watch.wait()
        for pid, status in reaper.reap():
            if pid == zygote:
                ended = status
        if ended is None and stop:
            os.kill(zygote, signal.SIGKILL)
            _, ended = os.waitpid(zygote, 0)
    with contextlib.suppress(TimeoutError):
        reaper.kill_strangers()
    exit_code, signal_number = reaper.exit_of(ended)
    return 128 + signal_number if signal_number is not None else exit_code or 0


def _prepare(settings: Mapping[str, Any], channel: socket.socket) -> bool:
    """Warm up, resolve the target, say so, and serve. False: the target could not be resolved."""
    for stream in (sys.stdout, sys.stderr):
        # Line by line, so that a child's last words are out when it is killed.
        stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    sys.path[:0] = settings["python_path"]
    notes = warm_up()
    try:
        target = _load(settings)
    except BaseException as error:
        message = {
            "error": shorten(_line(error), MAX_LINE_CHARS),
            "traceback": ""
            if isinstance(error, TargetError)
            else shorten(agent_traceback(error), MAX_TEXT_CHARS),
        }
        channel.send(json.dumps(message).encode())
        return False
    steps = plan.from_json(settings["steps"])
    gc.collect()
    gc.freeze()  # what is here now is never visited again, so its pages stay shared with children
    num_threads = len(os.listdir("/proc/self/task"))
    channel.send(json.dumps({"ready": True, "num_threads": num_threads, "notes": notes}).encode())
    _serve(target, steps, channel)
    return True


def _load(settings: Mapping[str, Any]) -> Any:
    if not settings["pickled"]:
        return resolve(settings["target"])
    try:
        import dill
    except ModuleNotFoundError:
        raise TargetError(
            "the agent was sent by value, which needs the package `dill` in its environment: "
            "install it there, or give the agent's import path"
        ) from None
    return dill.loads(base64.b64decode(settings["pickled"]))


def _line(error: BaseException) -> str:
    try:
        return str(error) if isinstance(error, TargetError) else f"{type(error).__name__}: {error}"
    except Exception:  # its `__str__` is the agent's code
        return type(error).__name__


def _serve(target: Any, steps: tuple[plan.Step, ...], channel: socket.socket) -> None:
    """Fork a child per order until the channel ends."""
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
        message, received, _, _ = socket.recv_fds(channel, MAX_ORDER_BYTES, 5)
        if not message:
            return
        fds = Descriptors(*received)
        control = socket.socket(fileno=os.dup(fds.control))
        try:
            pid = os.fork()
        except OSError as error:
            control.send(encode_status(Status(failed_step="fork", error=str(error))))
            control.close()
        else:
            if pid == 0:
                run_init(target, steps, fds)
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
