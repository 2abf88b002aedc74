"""The private folder of a child: made before it starts, removed when its processes are gone.

What a child left there is hostile: unreadable directories, trees deeper than any recursion, links.
Nothing is followed and nothing recurses.
"""

from __future__ import annotations

import contextlib
import errno
import os

PARTS = ("home", "work", "tmp")
MAX_COUNTED, MAX_DEPTH = 100_000, 64


def make_private(folder: str) -> None:
    """Raises `OSError`."""
    os.mkdir(folder, 0o700)
    for part in PARTS:
        os.mkdir(os.path.join(folder, part), 0o700)


def bytes_of(folder: str) -> int:
    """What the files below `folder` take on disk, as far as `MAX_COUNTED` and `MAX_DEPTH` go."""
    num_bytes = num_counted = 0
    pending = [(folder, 0)]
    while pending:
        directory, depth = pending.pop()
        with contextlib.suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                num_counted += 1
                if num_counted > MAX_COUNTED:
                    return num_bytes
                num_bytes += entry.stat(follow_symlinks=False).st_blocks * 512
                if depth < MAX_DEPTH and entry.is_dir(follow_symlinks=False):
                    pending.append((entry.path, depth + 1))
    return num_bytes


def remove_tree(folder: str) -> None:
    """Remove `folder` and all that is in it; a folder that is not there is fine.

    Directories inside directories are first moved up to the top, so that no path ever gets long
    and depth costs neither stack nor descriptors; nor does a number of entries cost memory: none is
    kept. Nobody else may be writing there any more.
    Raises `OSError`.
    """
    if os.path.islink(folder):  # put there in its place
        os.unlink(folder)
        return
    with contextlib.suppress(OSError):  # the usual child left nothing: four calls do
        for part in PARTS:
            os.rmdir(os.path.join(folder, part))
        os.rmdir(folder)
        return
    num_moved = 0
    while os.path.lexists(folder):
        os.chmod(folder, 0o700)
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    num_moved = _remove_one(entry.path, folder, num_moved)
                else:
                    os.unlink(entry.path)
        _remove_empty(folder)


def _remove_one(directory: str, top: str, num_moved: int) -> int:
    """Remove `directory`; those in it are moved to `top`. Returns how many were ever moved."""
    _make_usable(directory)
    while True:
        with os.scandir(directory) as entries:
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
                    continue
                _make_usable(entry.path)
                while os.path.lexists(moved := os.path.join(top, f"moved-{num_moved}")):
                    num_moved += 1
                os.rename(entry.path, moved)
        if _remove_empty(directory):
            return num_moved


def _make_usable(directory: str) -> None:
    """Listing it, and moving it, need this. Writing it where it is so already would cost as much as
    removing it."""
    if os.lstat(directory).st_mode & 0o700 != 0o700:
        os.chmod(directory, 0o700)


def _remove_empty(directory: str) -> bool:
    """False: there is something in it, which a listing did not show while others were removed."""
    try:
        os.rmdir(directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True
