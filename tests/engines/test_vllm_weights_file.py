"""An adapter's file is checked against the model before a server sees it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from areal_sub.engines.vllm.weights_file import adapter_settings, check_adapter, linear_names
from areal_sub.errors import ModelError
from areal_sub.records import WEIGHT_ADAPTER

BASE = {
    "model.embed_tokens.weight": [32, 16],
    "model.layers.0.mlp.up_proj.weight": [24, 16],
    "model.layers.0.self_attn.q_proj.weight": [16, 16],
    "model.layers.0.self_attn.q_proj.bias": [16],
    "model.norm.weight": [16],
    "lm_head.weight": [32, 16],
}
UP = "base_model.model.model.layers.0.mlp.up_proj"
HEAD = "base_model.model.lm_head"


def test_which_layers_may_have_an_adapter() -> None:
    assert linear_names(BASE) == ["q_proj", "up_proj"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{UP}.lora_A.weight": (4, 16), f"{UP}.lora_B.weight": (24, 4)}, None),
        ({f"{UP}.lora_A.weight": (8, 16)}, "lora_A.weight is of rank 8, the server takes 4"),
        ({f"{UP}.lora_B.weight": (24, 8)}, "lora_B.weight is of rank 8, the server takes 4"),
        ({f"{UP}.lora_B.weight": (23, 4)}, r"lora_B.weight is \[23, 4\], over \[24, 16\]"),
        ({f"{UP}.lora_C.weight": (4, 16)}, "unexpected .*lora_C"),
        ({"base_model.model.x.lora_A.weight": (4, 16)}, r"unexpected .*\.x\.lora_A"),
        ({f"{HEAD}.lora_A.weight": (4, 16)}, "not asked to adapt the output embedding"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], message: str | None
) -> None:
    path = tmp_path / "v1.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, path)
    if message is None:
        check_adapter(path, BASE, rank=4)
        return
    with pytest.raises(ModelError, match=message):
        check_adapter(path, BASE, rank=4)


def test_a_file_of_whole_weights_is_no_adapter(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "v1.safetensors")
    with pytest.raises(ModelError, match=r"is no adapter.s file"):
        adapter_settings(tmp_path / "v1.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "v2.safetensors", {WEIGHT_ADAPTER: "{}"})
    assert adapter_settings(tmp_path / "v2.safetensors") == "{}"
