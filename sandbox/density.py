"""Packs what forks of this process allocate onto few pages, each of which they copy to touch it.

An import leaves gaps all over the heap, and allocators fill gaps first: the small objects of one
call would lie on hundreds of pages. Here the gaps are taken, once and for good, so that what is
allocated from then on lies side by side. Called by the processes that others are forked from
(keeper, zygote) when they are warm. Best effort: an allocator that is not known gains nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from typing import Any

_MOST_BYTES = 2**19
"""Of gaps of one size."""
_ALIGNMENT = 16
_POOLED_BYTES = 512
"""What is larger, Python has from the C library."""
_RUN_BYTES = 3 * 1024
"""So much side by side is a fresh pool: Python 3.9's have 4 KiB, later ones' more."""
_NEAR = 4
"""Blocks: objects of this loop's own lie between those that it takes."""
_C_SIZES = (*(2**n for n in range(16, 10, -1)), *range(1024, _ALIGNMENT, -_ALIGNMENT))


class _Usage(ctypes.Structure):
    """struct mallinfo2, of which the last field is used: what is free at the top of the heap."""

    _fields_ = (("others", ctypes.c_size_t * 9), ("top_bytes", ctypes.c_size_t))


def settle() -> None:
    """What is here now is never visited by a collection again, so that its pages stay shared with
    forks, and no gaps are left between it."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # a C library without one of these functions
        _fill_heap(ctypes.PyDLL(None))
    _fill_pools(ctypes.pythonapi.PyObject_Malloc)
    gc.freeze()


def _fill_pools(malloc: Any) -> None:
    """Those of Python's own allocator, size by size, until it begins a new one."""
    malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    for size in range(_ALIGNMENT, _POOLED_BYTES + 1, _ALIGNMENT):
        last = run = 0
        for _ in range(_MOST_BYTES // size):
            at = malloc(size) or 0
            run = run + size if 0 < at - last <= _NEAR * size else 0
            if run >= _RUN_BYTES:
                break
            last = at


def _fill_heap(libc: Any) -> None:
    """The C library's, from large to small, until it takes from the top."""
    libc.mallinfo2.restype = _Usage
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    top = libc.sbrk(0) - libc.mallinfo2().top_bytes
    for size in _C_SIZES:
        for _ in range(max(16, _MOST_BYTES // size)):
            at = libc.malloc(size - 8)  # with its header it is `size`
            if at is None or at >= top:
                libc.free(at)
                break
