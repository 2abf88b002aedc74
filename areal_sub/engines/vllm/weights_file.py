"""What a weight file holds, read from its header alone: names, shapes, and the learner's probe.

An update is checked against the model folder before a server sees it, as a server that has begun to
load a wrong one has lost the old weights. No torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from areal_sub.engines.safetensors_file import DTYPES, METADATA, files_of, header_of
from areal_sub.errors import ModelError
from areal_sub.records import WEIGHT_ADAPTER, WEIGHT_PROBE

OUTPUT_EMBEDDING = "lm_head.weight"
ADAPTER_PREFIX = "base_model.model."
_MAX_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Probe:
    """A sequence, and what the learner says of it with these weights."""

    token_ids: list[int]
    logprobs: list[float]  # of token_ids[1:], at temperature 1

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """None where the file carries none."""
        raw = _metadata(path).get(WEIGHT_PROBE)
        if raw is None:
            return None
        data = json.loads(raw)
        return cls(data["token_ids"], data["logprobs"])


def shapes_of(path: Path) -> dict[str, list[int]]:
    """Of a safetensors file, or of all those in a folder. Raises `ModelError`."""
    return {name: entry["shape"] for name, entry in _entries(path).items()}


def dtypes_of(path: Path) -> dict[str, str]:
    """By torch's names. Raises `ModelError`."""
    entries = _entries(path)
    if unknown := sorted({e["dtype"] for e in entries.values()} - DTYPES.keys()):
        raise ModelError(f"{path} holds {unknown[0]}; there are: {', '.join(DTYPES)}")
    return {name: DTYPES[entry["dtype"]] for name, entry in entries.items()}


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


def linear_names(shapes: dict[str, list[int]]) -> list[str]:
    """Last parts of the names of layers that may have an adapter: all matrices but embeddings."""
    layers = (
        name.removesuffix(".weight").rpartition(".")[2]
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and name != OUTPUT_EMBEDDING
    )
    return sorted({layer for layer in layers if "embed" not in layer})


def adapter_settings(path: Path) -> str:
    """The `adapter_config.json` of an adapter's file. Raises `ModelError` where it is none."""
    settings = _metadata(path).get(WEIGHT_ADAPTER)
    if not isinstance(settings, str):
        raise ModelError(f"{path} is no adapter's file: its metadata have no {WEIGHT_ADAPTER}")
    return settings


def check_adapter(path: Path, base: dict[str, list[int]], *, rank: int) -> None:
    """Raises `ModelError` naming what does not fit the model, or the server's `rank`."""
    problems = []
    for name, shape in shapes_of(path).items():
        layer, _, part = name.removeprefix(ADAPTER_PREFIX).partition(".lora_")
        weight = base.get(f"{layer}.weight")
        if f"{layer}.weight" == OUTPUT_EMBEDDING:
            problems.append(f"{name} (vLLM is not asked to adapt the output embedding)")
            continue
        if part not in ("A.weight", "B.weight") or weight is None:
            problems.append(f"unexpected {name}")
            continue
        size, found = shape if part == "B.weight" else reversed(shape)
        if found > rank:
            problems.append(f"{name} is of rank {found}, the server takes {rank}")
        elif size not in weight:
            problems.append(f"{name} is {shape}, over {weight}")
    if problems:
        raise ModelError(
            f"the adapter in {path} does not fit the model, the old one stays in force: "
            f"{'; '.join(problems[:_MAX_SHOWN])}"
        )


def _entries(path: Path) -> dict[str, dict[str, Any]]:
    return {
        name: entry
        for file in files_of(path)
        for name, entry in header_of(file)[0].items()
        if name != METADATA
    }


def _metadata(path: Path) -> dict[str, Any]:
    metadata: dict[str, Any] = header_of(path)[0].get(METADATA, {})
    return metadata
