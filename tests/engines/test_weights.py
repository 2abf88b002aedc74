from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_lab import make_model
from safetensors.torch import load_file, save_file

from areal_sub.engines.embedded.weights import WeightNames, load_model, read_update
from areal_sub.errors import ModelError

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def names() -> WeightNames:
    return WeightNames.of(make_model("llama"))


def change(source: Path, target: Path, **changes: torch.Tensor | None) -> Path:
    tensors = load_file(source)
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor.contiguous()
    save_file(tensors, target / "model.safetensors")
    return target


def test_a_file_or_a_folder_of_shards(
    names: WeightNames, new_weights: Path, tmp_path: Path
) -> None:
    tensors = load_file(new_weights)
    keys = sorted(tensors)
    for i in range(2):
        save_file({k: tensors[k] for k in keys[i::2]}, tmp_path / f"shard-{i}.safetensors")
    for path in (new_weights, tmp_path):
        model = make_model("llama")
        with torch.inference_mode():
            read_update(path, names).apply(model)
        want = make_model("llama", seed=1).state_dict()
        assert all(t.equal(want[name]) for name, t in model.state_dict().items())
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tied_weights_may_be_there_once_under_either_name_or_twice(
    names: WeightNames, new_weights: Path, tmp_path: Path
) -> None:
    embed = load_file(new_weights)[EMBED]
    for changes in ({HEAD: embed.clone()}, {HEAD: embed.clone(), EMBED: None}):
        model = make_model("llama")
        read_update(change(new_weights, tmp_path, **changes), names).apply(model)
        assert model.lm_head.weight.equal(embed)
    with pytest.raises(ModelError, match="tied in the model, but differ"):
        read_update(change(new_weights, tmp_path, **{HEAD: embed + 1}), names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": None}, "missing model.norm.weight"),
        ({EMBED: None}, f"missing {EMBED}"),
        ({"model.extra": torch.zeros(1)}, "unexpected model.extra"),
        ({"model.norm.weight": torch.zeros(3)}, r"model.norm.weight is \[3\], not \[48\]"),
    ],
)
def test_what_does_not_fit_is_named(
    names: WeightNames,
    new_weights: Path,
    tmp_path: Path,
    changes: dict[str, torch.Tensor | None],
    message: str,
) -> None:
    with pytest.raises(ModelError, match=message):
        read_update(change(new_weights, tmp_path, **changes), names)


def test_untied_heads_are_both_needed(new_weights: Path) -> None:
    untied = WeightNames.of(make_model("llama-gqa"))
    with pytest.raises(ModelError, match=r"missing lm_head.weight"):
        read_update(new_weights, untied)


def test_unreadable_weights_are_named(names: WeightNames, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        read_update(tmp_path, names)
    with pytest.raises(ModelError, match=r"absent\.safetensors"):
        read_update(tmp_path / "absent.safetensors", names)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match=r"broken\.safetensors"):
        read_update(broken, names)


def test_a_loaded_model_lies_in_memory_of_its_own(tmp_path: Path) -> None:
    """Where it begins as its file says, processors are slow; and a file may be written over."""
    make_model("llama").save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype="float32", device=torch.device("cpu"))
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert all(tensor.data_ptr() % 64 == 0 for tensor in model.state_dict().values())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    want = make_model("llama").state_dict()
    assert all(tensor.equal(want[name]) for name, tensor in model.state_dict().items())
