"""Private folders that do not outlive their process for long, however it ends.

The owner holds a lock on the folder. Whoever makes the next one beside it removes those whose lock
is free: their owner was killed before it could clean up.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PREFIX = "areal-sub-"


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder of mode 0700 in `parent`, removed at the end; leftovers of the dead as well."""
    for other in parent.glob(f"{PREFIX}*"):
        _remove_if_abandoned(other)
    # Locked before it has the name that others look for.
    unnamed = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=parent))
    lock = os.open(unnamed, os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX)
    folder = unnamed.rename(parent / unnamed.name.removeprefix("."))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_if_abandoned(folder: Path) -> None:
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # another user's, or gone meanwhile
        return
    try:
        if os.fstat(lock).st_uid != os.geteuid():
            return
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass  # its owner lives
    finally:
        os.close(lock)
