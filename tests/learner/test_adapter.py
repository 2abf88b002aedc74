"""LoRA: what moves, what is exported, what a recovery point holds, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from areal_sub.config.schema import ActorConfig
from areal_sub.errors import CheckpointError, ConfigError
from areal_sub.learner.checkpoint import load_recovery, save_recovery
from areal_sub.learner.learner import Learner
from areal_sub.learner.model import PolicyModel

LORA = {"rank": 4, "alpha": 8}
IDS = [3, 17, 9, 30, 5, 2, 11]


def parameters(learner: Learner) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in learner._policy.hf.named_parameters()}


def logprobs(model: Any, ids: list[int] = IDS) -> torch.Tensor:
    """Of `ids[1:]`, by transformers alone."""
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return scores.gather(-1, torch.tensor(ids)[1:, None])[:, 0]


def probed(learner: Learner) -> tuple[list[int], torch.Tensor]:
    ids, values = learner._policy.probe()
    return ids, torch.tensor(values)


def test_it_begins_as_its_base_and_only_the_adapter_learns(
    load_learner: Any, groups: Any, model_folder: Path
) -> None:
    learner = load_learner(lora=LORA)
    base = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    ids, said = probed(learner)
    torch.testing.assert_close(said, logprobs(base, ids), rtol=0, atol=2e-6)

    before = parameters(learner)
    learner.step(groups)
    middle = parameters(learner)
    learner.step(groups)
    after = parameters(learner)
    own = {name for name in before if "lora_" in name}
    assert len(own) == 2 * 2 * 7  # A and B of seven layers in each of two blocks
    assert sum(p.numel() for g in learner.optimizer.param_groups for p in g["params"]) == sum(
        before[name].numel() for name in own
    )
    for name in before:
        # As B is 0, the first gradient of A is 0, too.
        assert torch.equal(before[name], middle[name]) == ("lora_B" not in name), name
        assert torch.equal(before[name], after[name]) == (name not in own), name


def test_the_first_gradient_is_that_of_the_weights_through_the_adapter(
    load_learner: Any, groups: Any
) -> None:
    """For W + s·B·A with B = 0: dL/dB is s · dL/dW · Aᵀ, dL/dW from a learner of all weights."""
    unclipped = {"lr": 1e-3, "gradient_clipping": 1e9}
    seen: list[dict[str, torch.Tensor]] = []
    for options in ({"lora": LORA}, {}):
        learner = load_learner(optimizer=unclipped, **options)
        named = list(learner._policy.hf.named_parameters())

        def look(*_: object, named: Any = named) -> None:
            seen.append({n: p.grad.clone() for n, p in named if p.grad is not None})

        learner.optimizer.register_step_pre_hook(look)
        if options:
            start = parameters(learner)
        learner.step(groups)
    adapter, whole = seen
    layer = "model.layers.1.mlp.up_proj"
    expected = 2.0 * whole[f"{layer}.weight"] @ start[f"{layer}.lora_A.default.weight"].T
    torch.testing.assert_close(
        adapter[f"{layer}.lora_B.default.weight"], expected, rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}], ids=str)
def test_exported_weights_compute_what_the_learner_computes(
    load_learner: Any,
    groups: Any,
    model_folder: Path,
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    learner = load_learner(lora=LORA, **options)
    for _ in range(3):
        learner.step(groups)
    learner.export_weights(tmp_path / "v3.safetensors", "float32")
    merged = load_file(tmp_path / "v3.safetensors")
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    base = logprobs(model)
    assert merged.keys() == {n for n in model.state_dict() if n != "lm_head.weight"}
    model.load_state_dict(merged, strict=False)
    ids, said = probed(learner)
    torch.testing.assert_close(logprobs(model, ids), said, rtol=0, atol=1e-5)
    assert (logprobs(model) - base).abs().max() > 1e-2, "nothing was learned"


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_checkpoint_is_a_model_with_the_adapter_beside_it(
    load_learner: Any, groups: Any, model_folder: Path, tmp_path: Path
) -> None:
    learner = load_learner(lora=LORA | {"target_modules": ["q_proj", "layers.0.mlp.down_proj"]})
    for _ in range(2):
        learner.step(groups)
    learner.save_pretrained(tmp_path / "final", str(model_folder))
    ids, said = probed(learner)

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    assert merged.__class__.__name__ == "LlamaForCausalLM"
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logprobs(merged, ids), said, rtol=0, atol=1e-5)

    base = AutoModelForCausalLM.from_pretrained(model_folder)
    model = PeftModel.from_pretrained(base, tmp_path / "final" / "adapter").eval()
    torch.testing.assert_close(logprobs(model, ids), said, rtol=0, atol=1e-5)
    with safe_open(tmp_path / "final/adapter/adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {name.split(".")[-3] for name in names} == {"q_proj", "down_proj"}
    assert len(names) == 2 * 3


def test_the_reference_is_the_base(load_learner: Any, groups: Any) -> None:
    """Against a learner of all weights: its reference is another copy of the same model."""
    with_adapter = load_learner(lora=LORA, kl_ctl=0.5)
    stats = [with_adapter.step(groups) for _ in range(3)]
    assert stats[0].kl_ref == 0.0
    assert stats[2].kl_ref > 1e-4

    ours = with_adapter._updates._prepare(list(scored(with_adapter, groups)))
    whole = load_learner(kl_ctl=0.5)
    theirs = whole._updates._prepare(list(scored(whole, groups)))
    for a, b in zip(ours.parts, theirs.parts, strict=True):
        assert a.ref_logprobs is not None and b.ref_logprobs is not None
        assert torch.equal(a.ref_logprobs, b.ref_logprobs)
    # It learns again afterwards.
    before = parameters(with_adapter)
    with_adapter.step(groups)
    after = parameters(with_adapter)
    assert any(not torch.equal(before[n], after[n]) for n in before)


def scored(learner: Learner, groups: Any) -> Any:
    return learner._score_groups(groups)[0]


@pytest.mark.parametrize(
    "options", [{"ppo_n_minibatches": 2}, {"dtype": "bfloat16", "kl_ctl": 0.1}], ids=str
)
def test_a_restored_adapter_goes_on_bit_by_bit(
    load_learner: Any, groups: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    options = options | {
        "lora": LORA,
        "optimizer": {"lr": 1e-2, "weight_decay": 0.1, "lr_scheduler_type": "cosine"},
    }
    learner = load_learner(**options)
    for _ in range(3):
        learner.step(groups)
    point = save_recovery(tmp_path, learner, {"version": 3})
    expected = [learner.step(groups) for _ in range(2)]
    assert sorted(p.name for p in point.iterdir()) == ["learner.pt", "state.json"]

    recovery = load_recovery(tmp_path)
    assert recovery is not None and recovery.model_path is None
    torch.manual_seed(99)  # where the restored adapter begins must not depend on it
    restored = load_learner(**options)
    restored.load_state_dict(recovery.learner_state)
    got = [restored.step(groups) for _ in range(2)]
    assert [s.loss for s in got] == [s.loss for s in expected]
    assert [s.kl_ref for s in got] == [s.kl_ref for s in expected]
    first, second = parameters(learner), parameters(restored)
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_the_start_is_drawn_by_the_seed_alone(load_learner: Any) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = load_learner(lora=LORA)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    second, other = load_learner(lora=LORA), load_learner(lora=LORA, seed=2)
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert torch.equal(parameters(first)[name], parameters(second)[name])
    assert not torch.equal(parameters(first)[name], parameters(other)[name])


def test_a_state_of_another_run_is_refused(
    load_learner: Any, make_llama: Callable[..., Path], groups: Any, tmp_path: Path
) -> None:
    learner = load_learner(lora=LORA)
    learner.step(groups)
    state = learner.state_dict()
    with pytest.raises(CheckpointError, match=r"is of a run with actor\.lora"):
        load_learner().load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"is of a run without actor\.lora"):
        load_learner(lora=LORA).load_state_dict(load_learner().state_dict())
    with pytest.raises(CheckpointError, match=r"is \[4, 32\], not \[8, 32\]: actor\.lora was ano"):
        load_learner(lora=LORA | {"rank": 8}).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"adapters differ in .*down_proj"):
        load_learner(lora=LORA | {"target_modules": ["q_proj"]}).load_state_dict(state)
    other = make_llama(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match=r"trained over another model than"):
        load_learner(path=other, lora=LORA).load_state_dict(state)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "kv_proj"], r"no layer 'kv_proj'; write \[all-linear\] or .*down_proj, gate"),
        (["lm_head"], "lm_head shares its weights"),
        (["embed_tokens"], "model.embed_tokens is not a linear layer"),
        (["input_layernorm"], "input_layernorm is not a linear layer"),
    ],
)
def test_targets_that_cannot_be_are_named(
    load_learner: Any, targets: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_learner(lora=LORA | {"target_modules": targets})


def test_without_peft_it_says_what_to_install(
    load_learner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"actor.lora needs peft .*areal-sub\[train\]"):
        load_learner(lora=LORA)


def test_several_processes_are_refused() -> None:
    with pytest.raises(ValueError, match="lora is trained by one process"):
        ActorConfig.model_validate({"path": "x", "num_processes": 2, "lora": LORA})


def test_layers_that_hold_their_weights_transposed(tmp_path: Path) -> None:
    """GPT-2's Conv1D: what is merged computes the same."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1,
        eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    actor = ActorConfig.model_validate({"path": str(tmp_path), "lora": LORA})
    policy = PolicyModel.load(
        str(tmp_path), dtype="float32", device=torch.device("cpu"), lora=actor.lora
    )
    for name, parameter in policy.hf.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids, said = policy.probe()
    model = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert (logprobs(model, ids) - torch.tensor(said)).abs().max() > 1e-2
    model.load_state_dict(policy.weights(torch.float32), strict=False)
    torch.testing.assert_close(logprobs(model, ids), torch.tensor(said), rtol=0, atol=1e-5)
