"""The exec'd program: stands above all processes of one agent, and ends them.

    tier process:     guardian ── zygote ── init ── agent
    tier namespaces:  guardian ── keeper ─┬─ zygote ── agent (in the cell of its init)
                                          └─ init

In the tier `bwrap` the same, in the namespaces of a program of others; in `gvisor` a `bridge` and a
`relay` stand in its place.

The guardian runs nothing of the agent's: it waits for its lifeline's end-of-file or for the end of
the process below it, then kills everything below it. So whatever import-time code does, closing one
socket (or dying) ends it all. Started by `launch` with a clean environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import traceback
from typing import Any, NoReturn

from . import cgroups, keeper, kernel, plan, reaper, zygote
from .layers import Context


def main(channel_fd: int, lifeline_fd: int, *group_fds: int) -> NoReturn:
    """Settings as JSON on stdin: `target` or `pickled` (base64 of dill), `python_path`, `plan`,
    `folder`, `groups` (folders). `group_fds`: into the zygote's group. Returns in no process."""
    code = 1
    try:
        kernel.reset_signals()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        kernel.become_subreaper()
        kernel.raise_open_files()
        kernel.ensure_core_limit()
        with open(0, "rb") as file:
            settings = json.load(file)
        os.open(os.devnull, os.O_RDONLY)  # becomes descriptor 0
        for stream in (sys.stdout, sys.stderr):
            # Line by line, so that a child's last words are out when it is killed.
            stream.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
        settings["plan"] = plan.from_json(settings["plan"])
        plan.apply(settings["plan"].outer, Context())
        settings["group"] = group_fds
        lifeline = socket.socket(fileno=lifeline_fd)
        channel = socket.socket(fileno=channel_fd)
        start = keeper.start if settings["plan"].root else _start_zygote
        below = start(settings, channel, lifeline)
        channel.close()
        for fd in group_fds:
            os.close(fd)
        kernel.set_name("sandbox-guard")
        code = _guard(below, lifeline)
        cgroups.remove_all(settings["groups"])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _start_zygote(settings: dict[str, Any], channel: socket.socket, lifeline: socket.socket) -> int:
    pid = os.fork()
    if pid == 0:
        lifeline.close()
        kernel.die_with_parent(signal.SIGKILL)
        kernel.become_subreaper()  # not inherited
        zygote.run(settings, channel)
    return pid


def _guard(below: int, lifeline: socket.socket) -> int:
    watch = reaper.Watch(lifeline.fileno())
    ended: int | None = None
    stop = False
    while ended is None:
        for pid, status in reaper.reap():  # first: it may have ended before there was a watch
            if pid == below:
                ended = status
        if ended is None and stop:
            os.kill(below, signal.SIGKILL)
            _, ended = os.waitpid(below, 0)
        elif ended is None:
            stop = watch.wait()
    with contextlib.suppress(TimeoutError):
        reaper.kill_strangers()
    return reaper.shell_code(ended)
