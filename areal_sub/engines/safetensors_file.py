"""What a safetensors file says of itself: read from its header alone, without torch.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from areal_sub.errors import ModelError

MAX_HEADER_BYTES = 100 * 2**20  # safetensors' own limit
METADATA = "__metadata__"
"""The one entry that is no tensor."""
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Those that weights may have, by torch's names."""


def files_of(path: Path) -> list[Path]:
    """A file, or all those in a folder. Raises `ModelError` where there is none."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ModelError(f"no *.safetensors in {path}")
    return files


def header_of(file: Path) -> tuple[dict[str, Any], int]:
    """The header, `METADATA` among the names, and where the tensors' bytes begin. Raises
    `ModelError`."""
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            if size > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {size} bytes")
            header: dict[str, Any] = json.loads(opened.read(size))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read weights from {file}: {error}") from None
    return header, 8 + size
