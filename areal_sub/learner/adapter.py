"""LoRA: the model's weights stay as they are; two small matrices beside each target layer learn.

A layer with the weight W computes with W + alpha / rank · B A. B is 0 at the start, so the policy
begins as its base; switched off (`off`), it is its base again. The only file that imports peft.

Invariants: what learns, and where it starts, depends on model, section and seed alone; to the
outside tensors have Hugging Face's names (merged weights) or those of peft's files (the adapter).

Called by `model` and `learner`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from areal_sub.config.schema import LoraConfig
from areal_sub.errors import ConfigError

ALL_LINEAR = "all-linear"
# peft's name of an adapter that is given none; it stands in the names of its tensors.
_NAME = "default"
_PARTS = ("lora_A", "lora_B")


class Adapter:
    """Use `Adapter.attach`."""

    def __init__(self, settings: Any, layers: dict[str, Any]) -> None:
        self._settings = settings
        self._layers = layers  # name in the model → the layer, with its matrices

    @classmethod
    def attach(cls, hf: Any, lora: LoraConfig, *, path: str, seed: int) -> Adapter:
        """Give `hf`, which was loaded from `path`, an adapter, and freeze all that is not of it.

        Raises `ConfigError` naming what of the section does not fit the model.
        """
        try:
            import peft
        except ImportError as error:
            raise ConfigError(
                f"actor.lora needs peft ({error}): pip install 'areal-sub[train]'"
            ) from error
        targets = _targets(hf, lora)
        settings = peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=0.0,  # the sampler has none
            target_modules=targets,
            bias="none",
            task_type="CAUSAL_LM",
            base_model_name_or_path=path,
            fan_in_fan_out=any(_is_transposed(module) for module in hf.modules()),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(settings, hf)
        settings.target_modules = targets  # in their order
        settings.inference_mode = True  # of who loads it from its files
        return cls(settings, {name: hf.get_submodule(name) for name in targets})

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model is its base; for computing without gradient."""
        for layer in self._layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.enable_adapters(True)

    @torch.no_grad()
    def merged(self, name: str, value: Tensor) -> tuple[str, Tensor] | None:
        """A tensor of the model's state as the model without adapter would have it to compute the
        same; None for the adapter's own."""
        parts = name.split(".")
        if any(part in _PARTS for part in parts):
            return None
        if "base_layer" not in parts[:-1]:
            return name, value
        layer = ".".join(parts[:-2])
        if parts[-1] == "weight":
            value = value + self._layers[layer].get_delta_weight(_NAME)
        return f"{layer}.{parts[-1]}", value

    def tensors(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """All of it, on the CPU, under the names of peft's files."""
        return {
            name: weight.detach().to("cpu", dtype).contiguous()
            for name, weight in self._weights().items()
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """What `tensors` gave. Raises `ValueError` where it is of another adapter."""
        weights = self._weights()
        if different := sorted(set(weights) ^ set(tensors)):
            raise ValueError(f"adapters differ in {', '.join(different[:5])}")
        for name, weight in weights.items():
            if weight.shape != tensors[name].shape:
                raise ValueError(
                    f"{name} is {list(tensors[name].shape)}, not {list(weight.shape)}: actor.lora "
                    "was another"
                )
            weight.copy_(tensors[name])

    def save(self, folder: Path) -> None:
        """Fill `folder` as peft does: `PeftModel.from_pretrained(base, folder)`."""
        folder.mkdir()
        save_file(self.tensors(), folder / "adapter_model.safetensors", {"format": "pt"})
        (folder / "adapter_config.json").write_text(self.settings() + "\n")

    def settings(self) -> str:
        """The text of peft's `adapter_config.json`."""
        return json.dumps(self._settings.to_dict(), indent=2, sort_keys=True, default=str)

    def _weights(self) -> dict[str, nn.Parameter]:
        return {
            f"base_model.model.{name}.{part}.weight": getattr(layer, part)[_NAME].weight
            for name, layer in self._layers.items()
            for part in _PARTS
        }


def _targets(hf: Any, lora: LoraConfig) -> list[str]:
    """Names of the layers that get an adapter. Raises `ConfigError` where one cannot have it."""
    modules = dict(hf.named_modules())
    linear = {name for name, module in modules.items() if _is_linear(module)}
    found: set[str] = set()
    for wanted in lora.target_modules:
        if wanted == ALL_LINEAR:
            names = {name for name in linear if modules[name] is not hf.get_output_embeddings()}
        else:
            names = {name for name in modules if name == wanted or name.endswith(f".{wanted}")}
        if not names:
            ends = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(
                f"actor.lora.target_modules: the model has no layer {wanted!r}; write "
                f"[{ALL_LINEAR}] or some of: {', '.join(ends)}"
            )
        found |= names
    for name in sorted(found):
        if name not in linear:
            raise ConfigError(f"actor.lora.target_modules: {name} is not a linear layer")
        if f"{name}.weight" in _shared_weights(hf):
            raise ConfigError(
                f"actor.lora.target_modules: {name} shares its weights with another layer, and "
                "cannot have an adapter of its own"
            )
    return sorted(found)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    """A linear layer that holds its weights the other way round: GPT-2's."""
    return type(module).__name__ == "Conv1D"


def _shared_weights(hf: Any) -> set[str]:
    """Names of tensors that the model has under more than one name."""
    names: dict[int, list[str]] = {}
    for name, value in hf.state_dict().items():
        names.setdefault(value.data_ptr(), []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group}
