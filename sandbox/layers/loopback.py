"""The child's own network: loopback alone, with listeners for the ways out.

They are bound before any of the agent's code runs and leave for whoever runs children: a connection
that arrives there was made in this child, whatever key or header it carries.
"""

from __future__ import annotations

import errno
import fcntl
import socket
import struct
from collections.abc import Mapping
from typing import Any

from .context import Context

NAME = "loopback"

_SIOCSIFFLAGS = 0x8914
_IFF_UP_RUNNING = 0x41
BACKLOG = 128


def probe() -> str:
    return ""  # a part of `namespaces`


def apply(args: Mapping[str, Any], context: Context) -> None:
    """`ports`: where listeners are bound."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        try:
            fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP_RUNNING))
        except OSError as error:
            if error.errno != errno.ENOTTY:  # in gVisor it is up from the start
                raise
    for port in args["ports"]:
        # The plain type: `socket.socket` and `create_server` take detours by enums, whose pages
        # each child's init would pay for.
        listener = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(BACKLOG)
        context.listeners.append(listener.detach())
