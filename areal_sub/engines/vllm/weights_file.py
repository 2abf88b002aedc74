"""What a weight file holds, read from its header alone: names, shapes, and the learner's probe.

An update is checked against the model folder before a server sees it, as a server that has begun to
load a wrong one has lost the old weights. No torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from areal_sub.errors import ModelError
from areal_sub.records import WEIGHT_PROBE

MAX_HEADER_BYTES = 100 * 2**20  # safetensors' own limit
OUTPUT_EMBEDDING = "lm_head.weight"
_MAX_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Probe:
    """A sequence, and what the learner says of it with these weights."""

    token_ids: list[int]
    logprobs: list[float]  # of token_ids[1:], at temperature 1

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """None where the file carries none."""
        raw = _header(path).get("__metadata__", {}).get(WEIGHT_PROBE)
        if raw is None:
            return None
        data = json.loads(raw)
        return cls(data["token_ids"], data["logprobs"])


def shapes_of(path: Path) -> dict[str, list[int]]:
    """Of a safetensors file, or of all those in a folder. Raises `ModelError`."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ModelError(f"no *.safetensors in {path}")
    return {
        name: entry["shape"]
        for file in files
        for name, entry in _header(file).items()
        if name != "__metadata__"
    }


def check_update(path: Path, base: dict[str, list[int]], *, tied: bool) -> None:
    """Raises `ModelError` naming what is missing, unexpected or of other shape.

    `tied`: the output embedding is the input embedding, so either file may leave it out.
    """
    given = shapes_of(path)
    optional = {OUTPUT_EMBEDDING} if tied else set()
    problems = [
        *(f"missing {name}" for name in base if name not in given and name not in optional),
        *(f"unexpected {name}" for name in given if name not in base and name not in optional),
        *(
            f"{name} is {shape}, not {base[name]}"
            for name, shape in given.items()
            if name in base and base[name] != shape
        ),
    ]
    if problems:
        more = f"; and {len(problems) - _MAX_SHOWN} more" if len(problems) > _MAX_SHOWN else ""
        raise ModelError(
            f"the weights in {path} do not fit the model, the old ones stay in force: "
            f"{'; '.join(problems[:_MAX_SHOWN])}{more}"
        )


def _header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {size} bytes")
            header: dict[str, Any] = json.loads(file.read(size))
            return header
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read weights from {path}: {error}") from None
