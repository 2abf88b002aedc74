"""The file in which new weights go to the engine, and the memory that it lies in.

To get a file's memory page by page, and to give it back, takes several times as long as to write
it. So who is done with a file `leave`s it, and the next one is written over it, unless somebody has
it open or under another name: such a file is theirs.

Tensors begin where processors copy best, which safetensors' own files do not see to.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Copies between addresses that are alike by this take two thirds of the time of others.
ALIGNMENT = 64
_SPARE = ".spare"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def leave(path: Path) -> None:
    """The file is not needed any more; another one in its folder may be written over it."""
    with suppress(FileNotFoundError):
        path.replace(path.with_name(_SPARE))


def write_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file. `weights`: contiguous, on the CPU. Raises `OSError`."""

    def is_odd(name: str) -> tuple[bool, int]:
        tensor = weights[name]
        return tensor.nbytes % ALIGNMENT != 0, -tensor.element_size()

    names = sorted(weights, key=is_odd)
    with open(_opened(path), "wb", buffering=0) as file:
        for data in (_header(names, weights, metadata), *(_bytes(weights[n]) for n in names)):
            left = data
            while left:
                left = left[file.write(left) :]
        file.truncate()


def _header(
    names: list[str], weights: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> memoryview:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for name in names:
        tensor = weights[name]
        end = start + tensor.nbytes
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return memoryview(len(text).to_bytes(8, "little") + text)


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def _opened(path: Path) -> int:
    """To be written from its beginning, and cut off behind."""
    with suppress(FileNotFoundError):
        path.with_name(_SPARE).rename(path)
        spare = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        if _is_ours_alone(spare):
            return spare
        os.close(spare)
        path.unlink()
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)


def _is_ours_alone(file: int) -> bool:
    """Whether nobody else has it open or mapped, or under another name."""
    try:
        # The kernel gives this lease to the only one who has the file open, to nobody else, and
        # tells us of who opens it meanwhile: by one that nobody minds.
        fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError:
        return False  # or it cannot tell
    fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return os.fstat(file).st_nlink == 1
