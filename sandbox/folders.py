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
    kept. Whoever writes there meanwhile (a zygote's import, in the tier `process`) can keep it from
    being removed, but never lead it elsewhere: each step is beside a descriptor of a folder that
    was opened through no link. Raises `OSError`.
    """
    if os.path.islink(folder):  # put there in its place
        os.unlink(folder)
        return
    try:
        top = _open_usable(folder)
    except FileNotFoundError:
        return
    try:
        with contextlib.suppress(OSError):  # the usual child left nothing
            for part in PARTS:
                os.rmdir(part, dir_fd=top)
        num_moved = 0
        while not _remove_empty(folder):
            with os.scandir(top) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        num_moved = _remove_one(entry.name, top, num_moved)
                    else:
                        os.unlink(entry.name, dir_fd=top)
    finally:
        os.close(top)


def _remove_one(name: str, top: int, num_moved: int) -> int:
    """Remove a directory in `top`; those in it are moved there. Returns how many ever were."""
    directory = _open_usable(name, top)
    try:
        while True:
            with os.scandir(directory) as entries:
                for entry in entries:
                    if not entry.is_dir(follow_symlinks=False):
                        os.unlink(entry.name, dir_fd=directory)
                        continue
                    os.close(_open_usable(entry.name, directory))  # to be moved, it has to be
                    while _is_there(moved := f"moved-{num_moved}", top):
                        num_moved += 1
                    os.rename(entry.name, moved, src_dir_fd=directory, dst_dir_fd=top)
            if _remove_empty(name, top):
                return num_moved
    finally:
        os.close(directory)


def _open_usable(name: str, beside: int | None = None) -> int:
    """A descriptor of a directory, never of what a link leads to, that can be listed and changed.
    Writing its mode where it is so already would cost as much as removing it."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, dir_fd=beside)
    except PermissionError:
        at = os.open(name, flags | os.O_PATH, dir_fd=beside)
        try:
            os.chmod(f"/proc/self/fd/{at}", 0o700)
            fd = os.open(".", flags, dir_fd=at)
        finally:
            os.close(at)
    if os.fstat(fd).st_mode & 0o700 != 0o700:
        os.fchmod(fd, 0o700)
    return fd


def _is_there(name: str, beside: int) -> bool:
    try:
        os.stat(name, dir_fd=beside, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _remove_empty(directory: str, beside: int | None = None) -> bool:
    """False: there is something in it, which a listing did not show while others were removed."""
    try:
        os.rmdir(directory, dir_fd=beside)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True
