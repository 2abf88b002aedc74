"""Makes pseudo-terminals, and tries with them what a child must not."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import termios
from typing import Any

TIOCSETD = 0x5423


def act(data: dict[str, Any]) -> Any:
    return _ACTS[data["do"]]()


def there() -> list[bool]:
    return [os.path.exists("/dev/ptmx"), os.path.exists("/dev/pts")]


def drive() -> str:
    """What a program that has a terminal says of it, and of what is typed."""
    pid, fd = pty.fork()
    if pid == 0:
        os.execv("/bin/sh", ["sh", "-c", 'stty size; read line; echo "<$line>"; [ -t 1 ]'])
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    os.write(fd, b"typed\n")
    said = b""
    try:
        while part := os.read(fd, 1000):
            said += part
    except OSError:  # EIO: the program has ended
        pass
    return f"{os.waitpid(pid, 0)[1]} {said.decode()}"


def exhaust() -> list[int]:
    opened = 0
    try:
        while opened < 100:
            os.openpty()
            opened += 1
    except OSError as error:
        return [opened, error.errno]
    return [opened, 0]


def misuse() -> list[int | None]:
    """Type for somebody else; have the kernel load a line discipline (N_GSM)."""
    _, slave = os.openpty()
    return [
        _errno(slave, termios.TIOCSTI, b"x"),
        _errno(slave, TIOCSETD, struct.pack("i", 21)),
    ]


def _errno(fd: int, request: int, argument: bytes) -> int | None:
    try:
        fcntl.ioctl(fd, request, argument)
    except OSError as error:
        return error.errno
    return None


def leave() -> str:
    """A program on a terminal that outlives the agent's process, and ignores a hang-up."""
    pid, fd = pty.fork()
    if pid == 0:
        os.execv("/bin/sh", ["sh", "-c", "trap '' HUP; echo ready; exec sleep 600"])
    os.read(fd, 1000)
    return "left"


_ACTS = {each.__name__: each for each in (there, drive, exhaust, misuse, leave)}
