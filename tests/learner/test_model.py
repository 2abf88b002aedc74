"""Loading, scoring and saving models of several architectures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from areal_sub.errors import ModelError
from areal_sub.learner.batch import Scored, collate
from areal_sub.learner.model import PolicyModel
from areal_sub.records import WEIGHT_PROBE, float32

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2": {"sliding_window": None},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 3.0},
    "OPT": {"ffn_dim": 32, "dropout": 0.5, "word_embed_proj_dim": 16, "init_std": 0.3},
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.5},
}


def make(family: str, folder: Path) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SIZES | FAMILIES[family]))
    hf = getattr(transformers, "OPTForCausalLM" if family == "OPT" else _class(family))(config)
    hf.save_pretrained(folder)
    return hf.eval()


def _class(family: str) -> str:
    return "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_models_own(
    family: str, gradient_checkpointing: bool, packed: bool, tmp_path: Path, make_sample: Any
) -> None:
    hf = make(family, tmp_path)
    policy = PolicyModel.load(
        str(tmp_path), dtype="float32", device=CPU, gradient_checkpointing=gradient_checkpointing
    )
    rows = [[3, 5, 7, 9, 11, 2], [4, 6, 8], [1, 30, 31, 2]]
    items = [
        Scored(make_sample(ids, range(1, len(ids))), float32([0.0] * len(ids))) for ids in rows
    ]
    assert policy.packs == (family != "OPT")  # whose mask knows nothing of position numbers
    packed = packed and policy.packs
    batch = collate([items[:1], items[1:]] if packed else [[item] for item in items])
    assert batch.input_ids.numel() == (10 if packed else 15)
    scores = policy.score(batch, temperature=0.5)
    logprobs, entropies = [], []
    for ids in rows:
        logits = hf(input_ids=torch.tensor([ids])).logits[0, :-1] / 0.5
        distribution = torch.distributions.Categorical(logits=logits)
        logprobs.append(distribution.log_prob(torch.tensor(ids[1:])))
        entropies.append(distribution.entropy())
    torch.testing.assert_close(scores.logprobs, torch.cat(logprobs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.entropies, torch.cat(entropies), rtol=1e-4, atol=1e-5)
    assert scores.logprobs.requires_grad and not scores.entropies.requires_grad


def test_a_model_with_logits_of_its_own_making_is_refused(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class whose forward does to its logits what the learner does not know of."""
    forward = LlamaForCausalLM.forward

    def odd(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        out.logits = out.logits * 1.01
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", odd)
    with pytest.raises(ModelError, match="in a way that the learner does not know"):
        PolicyModel.load(str(model_folder), dtype="float32", device=CPU)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder here"):
        PolicyModel.load(str(tmp_path / "nowhere"), dtype="float32", device=CPU)
    with pytest.raises(ModelError, match=str(tmp_path)):  # there, but empty
        PolicyModel.load(str(tmp_path), dtype="float32", device=CPU)


def damaged(model_folder: Path, folder: Path, damage: Callable[[Path], object]) -> str:
    shutil.copytree(model_folder, folder)
    damage(folder)
    return str(folder)


def test_damaged_models_are_refused(model_folder: Path, tmp_path: Path) -> None:
    def truncate(folder: Path) -> None:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])

    def drop_a_layer(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))

    def widen(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 40}))

    def unknown(folder: Path) -> None:
        (folder / "config.json").write_text('{"model_type": "abacus"}')

    def contradict(folder: Path) -> None:
        (folder / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": false}')

    for name, damage, message in [
        ("a", truncate, "cannot load"),
        ("b", drop_a_layer, r"incomplete: missing keys: model\.layers\.2"),
        ("c", widen, "cannot load|mismatched"),
        ("d", unknown, "abacus"),
        ("e", contradict, "temperature"),
    ]:
        path = damaged(model_folder, tmp_path / name, damage)
        with pytest.raises(ModelError, match=message) as caught:
            PolicyModel.load(path, dtype="float32", device=CPU)
        assert path in str(caught.value)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exported_weights_are_the_models(
    make_llama: Any, load_learner: Any, groups: Any, tmp_path: Path, tied: bool, dtype: str
) -> None:
    learner = load_learner(path=make_llama(tmp_path / "m", tie_word_embeddings=tied))
    learner.step(groups)
    target = tmp_path / "weights" / "v1.safetensors"
    learner.export_weights(target, dtype)
    learner.export_weights(target, dtype)  # in place of the one that is there
    weights = load_file(target)
    assert ("lm_head.weight" in weights) is not tied
    trained = learner._policy.hf.state_dict()
    assert set(trained) - set(weights) == ({"lm_head.weight"} if tied else set())
    for name, value in weights.items():
        assert value.dtype == getattr(torch, dtype)
        assert torch.equal(value, trained[name].to(value.dtype))
    assert [p.name for p in target.parent.iterdir()] == ["v1.safetensors"]
    with safe_open(target, framework="pt") as file:
        probe = json.loads(file.metadata()[WEIGHT_PROBE])
    ids = torch.tensor([probe["token_ids"]])
    scores = learner._policy.hf(ids).logits[0].log_softmax(-1)
    want = scores[:-1].gather(1, ids[0, 1:, None])[:, 0]
    assert torch.allclose(torch.tensor(probe["logprobs"]), want, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_folder_is_a_hugging_face_model(
    load_learner: Any, model_folder: Path, groups: Any, tmp_path: Path, dtype: str
) -> None:
    learner = load_learner(dtype=dtype)
    target = tmp_path / "checkpoints" / "final"
    learner.save_pretrained(target, str(model_folder))
    learner.step(groups)
    learner.save_pretrained(target, str(model_folder))  # in place of the one that is there
    assert sorted(p.name for p in target.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [p.name for p in target.parent.iterdir()] == ["final"]
    assert json.loads((target / "config.json").read_text())["dtype"] == dtype
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    assert loaded.dtype == getattr(torch, dtype)
    for name, value in learner._policy.hf.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.to(loaded.dtype))
    # The next run can start from it, and its dropout is the model's own still.
    PolicyModel.load(str(target), dtype=dtype, device=CPU)
    assert loaded.config.attention_dropout == 0.5


def test_a_tokenizer_that_is_not_there_is_named(load_learner: Any, tmp_path: Path) -> None:
    learner = load_learner()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no tokenizer files in .*empty"):
        learner.save_pretrained(tmp_path / "out", str(tmp_path / "empty"))
    with pytest.raises(ModelError, match="cannot get the tokenizer"):
        learner.save_pretrained(tmp_path / "out", str(tmp_path / "no" / "such" / "folder"))
    assert not (tmp_path / "out").exists()


def test_dropout_is_off(model_folder: Path) -> None:
    policy = PolicyModel.load(
        str(model_folder), dtype="float32", device=CPU, gradient_checkpointing=True
    )
    assert not any(m.training for m in policy.hf.modules() if isinstance(m, nn.Dropout))
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(policy._hidden(ids), policy._hidden(ids))
