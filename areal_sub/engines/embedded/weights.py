"""Weights: loading a model folder, checking that this engine can serve it, reading an update.

Checking an update happens off the decode thread and touches nothing; only `WeightUpdate.apply`, on
the decode thread between two steps, reads it into the model. So a bad update leaves the old weights
in force.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from areal_sub import linear
from areal_sub.engines.safetensors_file import DTYPES, METADATA, files_of, header_of
from areal_sub.errors import ModelError

log = logging.getLogger(__name__)

DEFAULT_MAX_MODEL_LEN = 4096
# Under this many parameters a second torch thread costs more than it brings.
TINY_NUM_PARAMETERS = 5_000_000

# Of an update. The steps wait for it, and one processor copies slower than memory takes it.
NUM_READERS = min(4, os.cpu_count() or 1)
SMALL_BYTES = 2**24  # not worth a thread

Shape = tuple[int, ...]


def load_model(path: str, *, dtype: str, device: torch.device) -> Any:
    """A causal LM in eval mode. Raises `ModelError`."""

    def load(attention: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation=attention
        )

    try:
        try:
            model = load("sdpa")
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            log.warning("%s does not support sdpa, so its own attention is used", path)
            model = load("eager")
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"cannot load a causal LM from {path!r}: {error}") from error
    if device.type == "cpu":
        # transformers leaves them in a mapping of the file, wherever they begin there: what is
        # written into it is copied page by page, and processors work best on what begins at 64.
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
    linear.use_in(model)
    return model.to(device).eval().requires_grad_(False)


def load_config(path: str) -> Any:
    """The decoder's config. Raises `ModelError`."""
    try:
        return AutoConfig.from_pretrained(path).get_text_config(decoder=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot read a model config from {path!r}: {error}") from error


def served_model_len(config: Any, wanted: int | None) -> int:
    """Prompt and new tokens together, at most. Raises `ModelError` where this engine's cache, of
    keys and values of every token in every layer, is not what the model needs."""
    limit = getattr(config, "max_position_embeddings", None)
    length = wanted or min(limit or DEFAULT_MAX_MODEL_LEN, DEFAULT_MAX_MODEL_LEN)
    if limit is not None and length > limit:
        raise ModelError(
            f"max_model_len {length} exceeds the model's max_position_embeddings {limit}"
        )
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if not kinds:
        kinds = {"full_attention" if window is None else "sliding_attention"}
    # Up to its window's length, sliding attention is full attention.
    if window is not None and window >= length:
        kinds.discard("sliding_attention")
    if unsupported := sorted(kinds - {"full_attention"}):
        advice = (
            f"; set max_model_len to at most the window, {window}"
            if unsupported == ["sliding_attention"] and window is not None
            else ""
        )
        raise ModelError(
            f"the embedded engine serves full attention only; {config.model_type} has layers of "
            f"{', '.join(unsupported)} (max_model_len {length}){advice}"
        )
    return length


@dataclass(frozen=True, slots=True)
class WeightNames:
    """What an update must bring: all of the model's state dict, of tied tensors at least one."""

    shapes: dict[str, Shape]
    groups: dict[str, str]  # name → the first name of the same storage

    @classmethod
    def of(cls, model: Any) -> WeightNames:
        state: dict[str, Tensor] = model.state_dict(keep_vars=True)
        first: dict[tuple[int, Shape, Shape], str] = {}
        groups = {
            name: first.setdefault((t.data_ptr(), tuple(t.shape), tuple(t.stride())), name)
            for name, t in state.items()
        }
        return cls({name: tuple(t.shape) for name, t in state.items()}, groups)

    def check(self, given: Mapping[str, Shape], where: str) -> None:
        """Raises `ModelError` naming every tensor that is missing, unexpected or of other shape."""
        covered = {self.groups[name] for name in given if name in self.groups}
        problems = [
            *(
                f"missing {name}"
                for name in self.shapes
                if self.groups[name] == name and name not in covered
            ),
            *(f"unexpected {name}" for name in given if name not in self.shapes),
            *(
                f"{name} is {list(shape)}, not {list(self.shapes[name])}"
                for name, shape in given.items()
                if name in self.shapes and shape != self.shapes[name]
            ),
        ]
        if problems:
            shown = "; ".join(problems[:8])
            more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise ModelError(
                f"the weights in {where} do not fit the model, the old ones stay in force: "
                f"{shown}{more}"
            )


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a safetensors file, none of which is in memory yet."""

    path: Path
    name: str
    shape: Shape
    dtype: torch.dtype | None  # None: one that is not read directly
    start: int  # of its bytes in the file

    def load(self) -> Tensor:
        with safe_open(str(self.path), framework="pt") as weights:
            tensor: Tensor = weights.get_tensor(self.name)
            return tensor

    def read_into(self, target: Tensor, fd: int) -> None:
        """Read, where nothing has to be converted: a mapped file costs a page fault for each 4 KiB,
        which takes several times as long as the copy. `fd`: the file, open."""
        if target.device.type != "cpu" or target.dtype is not self.dtype or not _is_dense(target):
            target.copy_(self.load())
            return
        into: Any = target.reshape(-1).view(torch.uint8).numpy()
        left, at = memoryview(into), self.start
        while left:
            num_read = os.preadv(fd, [left], at)
            if not num_read:
                raise ModelError(f"{self.path} ends within {self.name}")
            left, at = left[num_read:], at + num_read


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and not tensor.requires_grad


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    tensors: Mapping[str, Tensor | Stored]

    def apply(self, model: Any) -> None:
        """Copy in place: what is tied stays tied, and no second model lives on the device."""
        state = model.state_dict()
        paths = {tensor.path for tensor in self.tensors.values() if isinstance(tensor, Stored)}
        largest_first = sorted(self.tensors, key=lambda name: -state[name].nbytes)
        with ExitStack() as stack:
            files = {path: stack.enter_context(path.open("rb", buffering=0)) for path in paths}

            @torch.inference_mode()  # which each thread has to itself
            def put(name: str) -> None:
                tensor = self.tensors[name]
                if isinstance(tensor, Stored):
                    tensor.read_into(state[name], files[tensor.path].fileno())
                else:
                    state[name].copy_(tensor)

            each: Callable[..., Iterable[None]] = map
            if sum(tensor.nbytes for tensor in state.values()) > SMALL_BYTES:
                each = stack.enter_context(ThreadPoolExecutor(NUM_READERS)).map
            for _ in each(put, largest_first):
                pass


def _stored_in(file: Path) -> Iterator[Stored]:
    """Raises `SafetensorError`, `OSError`."""
    with safe_open(str(file), framework="pt"):
        pass  # the library's own checks: of the header, and that all of the file is there
    header, data_start = header_of(file)
    for name, entry in header.items():
        if name != METADATA:
            dtype = getattr(torch, DTYPES[entry["dtype"]]) if entry["dtype"] in DTYPES else None
            start = data_start + entry["data_offsets"][0]
            yield Stored(file, name, tuple(entry["shape"]), dtype, start)


def read_update(path: Path, names: WeightNames) -> WeightUpdate:
    """Read and check a safetensors file, or all those in a folder. Raises `ModelError`."""
    tensors: dict[str, Stored] = {}
    try:
        for stored in (stored for file in files_of(path) for stored in _stored_in(file)):
            if stored.name in tensors:
                raise ModelError(f"{stored.name} is in more than one file of {path}")
            tensors[stored.name] = stored
        names.check({name: stored.shape for name, stored in tensors.items()}, str(path))
        for name in list(tensors):
            first = names.groups[name]
            if first != name and first in tensors:
                if not torch.equal(tensors[first].load(), tensors[name].load()):
                    raise ModelError(
                        f"{path}: {first} and {name} are tied in the model, but differ"
                    )
                del tensors[name]
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read weights from {path}: {error}") from None
    return WeightUpdate(tensors)
