"""In the child: an archive's content becomes the beginning of the working directory.

Runs in the sealed child, within its limits, before any of the agent's code. `workspace` makes the
archive: a list of [path, kind, mode, mtime_ns, size, target], folders before what is in them.
"""

from __future__ import annotations

import errno
import os

from . import archive

FILE, FOLDER, LINK = "file", "folder", "link"


def unpack(fd: int) -> None:
    """Put it into the working directory, which is empty. Raises `OSError` and `ValueError`."""
    entries = archive.read_index(fd)
    mask = os.umask(0)
    at = 0
    for name, kind, mode, mtime_ns, size, target in entries:
        if kind == FOLDER:
            os.mkdir(name, 0o700)
        elif kind == LINK:
            os.symlink(target, name)
        else:
            file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
            try:
                archive.copy_content(fd, at, size, file)
                os.utime(file, ns=(mtime_ns, mtime_ns))
            except OSError as error:
                error.filename = name
                raise
            finally:
                os.close(file)
            at += size
    for name, kind, mode, mtime_ns, _, _ in reversed(entries):  # when nothing more goes into them
        if kind == FOLDER:
            os.chmod(name, mode)
            os.utime(name, ns=(mtime_ns, mtime_ns))
    os.umask(mask)


def why_not_unpacked(error: Exception) -> str:
    """A line that begins with the error's code, for `report`."""
    if isinstance(error, OSError) and error.errno is not None:
        where = f" at {error.filename!r}" if error.filename else ""
        return f"{errno.errorcode.get(error.errno, error.errno)}: {error.strerror}{where}"
    return f"{type(error).__name__}: {error}"
