"""Pays ahead, in children that stand ready, for the pages that their first model call will touch.

A fork shares its pages with the zygote until it writes to them: some 2,000 copies at a first call,
most of what it costs. Which pages those are a *trial* tells once: a fork of the warm zygote that
makes the warm-up's calls and looks up what it then has to itself. A child that waits for its
request copies the same pages. Their content stays as it is: nothing runs, no agent, no SDK, so
there is nothing of a rehearsal that an agent could find. A request never waits for it: what is not
copied by then is copied when it is touched, as ever.

Called by `zygote` (`watch`) and `child` (`copy_ahead`). Best effort: where the kernel does not tell
(pagemap) or copy (`MADV_POPULATE_WRITE`, Linux 5.14), nothing is done ahead.
Format: the kernel's admin-guide/mm/pagemap.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import resource
import select
from collections.abc import Callable, Iterator

from . import kernel

Range = tuple[int, int, bool]
"""First address, number of bytes; whether it is written to (else it is only read)."""

_PAGE_BYTES = resource.getpagesize()
_PRESENT, _EXCLUSIVE = 1 << 63, 1 << 56
RANGES_AT_A_TIME = 32
"""So that a request waits a fraction of a millisecond at most."""

_ranges: list[Range] = []


def watch(work: Callable[[], object]) -> None:
    """Have a fork do `work`, and keep for this process's forks which pages it touched."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
            with open(writer, "w") as pipe:
                json.dump(list(_touched()), pipe)
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    _ranges.extend((start, size, written) for start, size, written in json.loads(said or "[]"))


def copy_ahead(request_fd: int) -> None:
    """Copy those pages, for as long as `request_fd` has nothing to read."""
    requested = select.poll()
    requested.register(request_fd, select.POLLIN)
    with contextlib.suppress(OSError):
        for index in range(0, len(_ranges), RANGES_AT_A_TIME):
            if requested.poll(0):
                return
            for start, size, written in _ranges[index : index + RANGES_AT_A_TIME]:
                kernel.populate(start, size, written)


def _touched() -> Iterator[Range]:
    """What this fork has touched of what it shares with its parent: of its writable private memory
    what it has to itself, of the files it has mapped what is mapped by now."""
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
    with open("/proc/self/maps", "rb") as file:
        lines = file.read().splitlines()
    for line in lines:
        addresses, permissions, _, _, inode, *path = line.split(maxsplit=5)
        writable = permissions == b"rw-p"
        if path == [b"[stack]"] or not (writable or (permissions == b"r-xp" and inode != b"0")):
            continue
        first, end = (int(address, 16) // _PAGE_BYTES for address in addresses.split(b"-"))
        entries = array.array("Q", os.pread(pagemap, 8 * (end - first), 8 * first))
        wanted = _PRESENT | _EXCLUSIVE if writable else _PRESENT
        begun = None
        for page, entry in enumerate([*entries, 0], start=first):
            if entry & wanted == wanted:
                begun = page if begun is None else begun
            elif begun is not None:
                yield begun * _PAGE_BYTES, (page - begun) * _PAGE_BYTES, writable
                begun = None
