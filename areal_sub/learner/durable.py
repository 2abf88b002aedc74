"""Files and folders that are there whole or not at all, also after a crash or a power cut.

Written beside their target under a name that starts with `.partial-`, flushed to the disk, then
renamed. What a crash leaves is such a partial, which nobody reads and the next write removes. Where
the disk does not take it, that is a `WriteError`, and the target is as it was before. Called by
`learner` and `checkpoint`; one writer per target.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from areal_sub.errors import WriteError


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yields the path to write; it replaces `target` when the block ends without an error."""
    partial = target.parent / f".partial-{target.name}"
    with _named(target, partial):
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _sync(partial)
        partial.replace(target)
        _sync(target.parent)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder to fill; it becomes `target` when the block ends without an error.

    A folder that is at `target` is replaced. As a rename cannot replace a filled folder, there is
    then a moment with neither: who needs the old one until the new one is there takes a new name.
    """
    partial = target.parent / f".partial-{target.name}"
    with _named(target, partial):
        target.parent.mkdir(parents=True, exist_ok=True)
        yield from _whole_folder(target, partial)


def _whole_folder(target: Path, partial: Path) -> Iterator[Path]:
    replaced = target.parent / f".partial-replaced-{target.name}"
    for leftover in (partial, replaced):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir()
    yield partial
    for root, _, names in os.walk(partial):
        for name in names:
            _sync(Path(root, name))
        _sync(Path(root))
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    _sync(target.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


@contextmanager
def _named(target: Path, partial: Path) -> Iterator[None]:
    """Failures to write, with the target's name, and without what was written."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        ways = ("inline_container", "Parent directory")  # in which torch says that it cannot write
        if isinstance(error, RuntimeError) and not any(way in str(error) for way in ways):
            raise
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        free = ""
        with suppress(OSError):
            num_bytes = shutil.disk_usage(target.parent).free
            free = f"; without it, {num_bytes / 2**20:.1f} MiB are free there"
        text = " ".join(str(_cause(error)).split())[:300]
        raise WriteError(f"cannot write {target}: {text}{free}") from error


def _cause(error: BaseException) -> BaseException:
    """Where torch writes to a file of Python's, its own error is about what follows from that
    file's, such as that there is no space left."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return found or error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
