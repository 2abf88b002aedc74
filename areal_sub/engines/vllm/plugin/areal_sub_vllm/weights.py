"""Weight-transfer backends: from a safetensors file, or by broadcast from the trainer's machine.

A server is started with `--weight-transfer-config '{"backend": "areal-sub-file"}'`, or
`areal-sub-gloo` or `areal-sub-nccl`.

Why backends of our own: vLLM's need a GPU, and its `reload_weights` leaves a tied output embedding
as it was on a CPU, where it is kept a second time, packed. A file in /dev/shm is memory that
trainer and server share; a broadcast reaches servers on other machines. Its group is made with
the first update, and anew for each sender: nothing has to be agreed on before.

Invariant: once `finish_weight_update` returned, every tensor of a file that the model keeps
unpacked, under its own name or as a part of a fused one, was compared with it, value by value. What
is packed or split over ranks, or was broadcast, only shows in what the model computes: whoever
updates checks that.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from . import group

log = logging.getLogger("vllm.areal_sub")  # a name that vLLM's logging shows


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing to agree on: each update names its file."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    path: str
    """A safetensors file, or a folder of them, that this process can read."""


class FileWeights(WeightTransferEngine[InitInfo, UpdateInfo]):
    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    _path = ""

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class synchronizes an accelerator, which a CPU server does not have.
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: UpdateInfo) -> None:
        self._path = update_info.path
        self.model.load_weights(_tensors(self._path))

    def finish_weight_update(self) -> None:
        self._finalize()
        num_compared, num_tensors = _compare(self.model, self._path)
        log.info("%d of %d tensors of %s compared", num_compared, num_tensors, self._path)

    def _finalize(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        for module in self.model.modules():
            # A tied one has no tensor of its own in the file, so it was not processed again.
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        pass


@dataclass
class BroadcastInfo(WeightTransferUpdateInfo):
    group: str
    """Its name. Another one than before: the sender has begun anew."""
    host: str
    port: int
    """Of the sender's store."""
    size: int
    timeout_s: float
    tensors: list[tuple[str, str, list[int]]]
    """Names, dtypes, shapes."""


class GlooWeights(FileWeights):
    update_info_cls = BroadcastInfo
    kind = "gloo"

    _name = ""
    _group: Any = None

    def receive_weights(self, update_info: BroadcastInfo) -> None:
        if update_info.group != self._name:
            self._group = self._join(update_info)
            self._name = update_info.group
        self.model.load_weights(group.receive(self._group, self.kind, update_info.tensors))

    def _join(self, info: BroadcastInfo) -> Any:
        parallel = self.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        store = dist.TCPStore(  # type: ignore[attr-defined]
            info.host,
            info.port,
            info.size,
            is_master=False,
            timeout=timedelta(seconds=info.timeout_s),
        )
        return group.join(
            self.kind,
            store,
            info.group,
            rank=group.SENDER + 1 + worker,
            size=info.size,
            address=group.address_towards(info.host),
            timeout_s=info.timeout_s,
        )

    def finish_weight_update(self) -> None:
        self._finalize()


class NcclWeights(GlooWeights):
    kind = "nccl"


def _tensors(path: str) -> Iterator[tuple[str, Tensor]]:
    where = Path(path)
    files = sorted(where.glob("*.safetensors")) if where.is_dir() else [where]
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {path}")
    for each in files:
        with safe_open(str(each), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                yield name, file.get_tensor(name)


def _compare(model: torch.nn.Module, path: str) -> tuple[int, int]:
    """(tensors compared, tensors in the file). Raises where one differs from the model's."""
    parameters = dict(model.named_parameters())
    parts_of: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    whole_of = {
        part: (whole, i) for whole, parts in parts_of.items() for i, part in enumerate(parts)
    }
    next_row: dict[str, int] = {}  # of a fused parameter: where its next part begins
    pending: dict[str, dict[int, Tensor]] = {}
    num_compared = num_tensors = 0
    for name, tensor in _tensors(path):
        num_tensors += 1
        if name in parameters:
            num_compared += _same(parameters[name], 0, tensor, name)
            continue
        module = name.split(".")[-2] if "." in name else ""
        if module not in whole_of:
            continue
        whole, index = whole_of[module]
        fused = name.replace(f".{module}.", f".{whole}.")
        if fused not in parameters:
            continue
        waiting = pending.setdefault(fused, {})
        waiting[index] = tensor
        if len(waiting) == len(parts_of[whole]):  # in the order of the fused rows
            row = next_row.get(fused, 0)
            for i in range(len(waiting)):
                num_compared += _same(parameters[fused], row, waiting[i], name)
                row += len(waiting[i])
            del pending[fused]
    return num_compared, num_tensors


def _same(parameter: Tensor, row: int, tensor: Tensor, name: str) -> bool:
    """False: not comparable (packed, split or quantized). Raises where the values differ."""
    if parameter.ndim != tensor.ndim or parameter.dtype not in (
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ):
        return False
    if parameter.shape[1:] != tensor.shape[1:] or len(parameter) < row + len(tensor):
        return False
    part = parameter[row : row + len(tensor)]
    if not torch.equal(part, tensor.to(part.device, part.dtype)):
        raise RuntimeError(f"after the update {name} in the model is not what the file holds")
    return True


BACKENDS = {
    "areal-sub-file": FileWeights,
    "areal-sub-gloo": GlooWeights,
    "areal-sub-nccl": NcclWeights,
}


def register() -> None:
    for name, backend in BACKENDS.items():
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(name, backend)
