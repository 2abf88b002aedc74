"""Attacks at import: this module's code runs in the zygote, before any child is sealed.

What to aim at comes from a file beside it. `act` tells a child what came of them.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import socket
import sys
import time
from typing import Any

import attacks
import on_resources

with open(os.path.join(os.path.dirname(__file__), "aims.json")) as _file:
    AIMS = json.load(_file)

AT_IMPORT = {
    name: attacks.act({**AIMS, "attack": name, "at_import": True})
    for name in ("a01", "a02", "a04", "a05", "a17", "a18", "a22", "a23", "a28", "a44a", "a46a")
}
TAKEN_AT_IMPORT = attacks.act({"attack": "a69c"})

# For the children to come: memory that they share, and a tool box without its sharp tools.
on_resources.SHARED.append(mmap.mmap(-1, 4096))
if AIMS["tear_out"]:
    for _layer in ("rlimits", "capabilities"):
        sys.modules["_sandbox.layers"].APPLY[_layer] = lambda args, context: None


def _look(doors: list[int]) -> str:
    """What is in an ended child's files, in there."""
    kernel = sys.modules["_sandbox.kernel"]
    kernel.enter(doors[0], kernel.CLONE_NEWUSER)
    kernel.enter(doors[1], kernel.CLONE_NEWNS)
    until = time.monotonic() + 5
    while time.monotonic() < until:
        time.sleep(0.05)
        try:
            size = os.stat("/box/own/work/kept").st_size
        except OSError as error:
            return f"stopped: {errno.errorcode[error.errno]}"
    return f"SUCCEEDED: {size} bytes"


def _look_once() -> None:
    _, doors, _, _ = socket.recv_fds(on_resources.LEFT[1], 16, 2)
    try:
        said = _look(doors)
    except OSError as error:
        said = f"stopped: {errno.errorcode[error.errno]}"
    on_resources.SHARED[0][8 : 8 + len(said)] = said.encode()


# And a pair of sockets that children are not to have.
on_resources.LEFT += socket.socketpair()
_kernel = sys.modules["_sandbox.kernel"]
_close = _kernel.close_all_descriptors_but


def _close_others(keep: set[int]) -> None:
    _close({*keep, *(one.fileno() for one in on_resources.LEFT)})


for _module in (_kernel, sys.modules["_sandbox.layers.descriptors"]):
    _module.close_all_descriptors_but = _close_others
if AIMS["helper"] and os.fork() == 0:
    try:
        _look_once()
    finally:
        os._exit(0)


def _frame_of_the_zygote() -> dict[str, Any]:
    frame = sys._getframe()
    while frame is not None and "settings" not in frame.f_locals:
        frame = frame.f_back
    return dict(frame.f_locals) if frame is not None else {}


def _put_links(around: str) -> None:
    """In place of the folders that a child left, as soon as the first of them are being removed."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        for child in ("1", "2", "3"):
            try:
                moved = [name for name in os.listdir(f"{around}/{child}") if "moved-" in name]
            except OSError:
                continue
            for number, name in enumerate(reversed(moved) if len(moved) > 500 else ()):
                try:
                    os.rename(f"{around}/{child}/{name}", f"{around}/kept-{child}-{number}")
                    os.symlink(AIMS["home"], f"{around}/{child}/{name}")
                except OSError:
                    continue
        time.sleep(0.001)


def _with_a_listener(run_init: Any) -> Any:
    def run(target: Any, made: Any, folder: str, fds: Any) -> Any:
        with socket.socket(fileno=os.dup(fds.control)) as control, socket.socket() as own:
            socket.send_fds(control, [b"ready"], [own.fileno()])
        return run_init(target, made, folder, fds)

    return run


if AIMS["lies"] == "links" and os.fork() == 0:
    try:
        _put_links(_frame_of_the_zygote()["settings"]["folder"])
    finally:
        os._exit(0)
if AIMS["lies"] == "listener":
    _zygote = sys.modules["_sandbox.zygote"]
    _zygote.run_init = _with_a_listener(_zygote.run_init)
if AIMS["lies"] == "ready":
    _frame_of_the_zygote()["channel"].send(b'{"ready": true, "notes": 1, "num_threads": {}}')


def a71f(data: dict[str, Any]) -> str:
    for number in range(1500):
        os.mkdir(f"folder-{number}")
    return "left"


def act(data: dict[str, Any]) -> Any:
    if data["attack"] == "a71f":
        return a71f(data)
    told = {"a69a": AT_IMPORT, "a69c": TAKEN_AT_IMPORT}
    return told[data["attack"]] if data["attack"] in told else attacks.act(data)
