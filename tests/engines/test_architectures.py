"""What "any Hugging Face causal LM with full attention" means, held against transformers itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from engine_lab import (
    CONFIGS,
    SMALL,
    LocalDecoder,
    greedy_reference,
    make_model,
    prompt_of,
    request_of,
)

from areal_sub.engines.embedded.runner import Runner, _pad, check_runner
from areal_sub.engines.embedded.weights import WeightUpdate, load_model, served_model_len
from areal_sub.errors import ModelError


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_those_of_transformers_generate(
    name: str, decoders: Callable[..., LocalDecoder]
) -> None:
    model = make_model(name)
    decoder = decoders(model)
    lengths = (3, 17, 40, 1, 33)

    def join() -> None:  # a batch that is running
        for length in lengths[2:]:
            decoder.send(request_of(prompt_of(length), max_new_tokens=25))

    decoder.send(request_of(prompt_of(lengths[0]), stream=True), at=3, act=join)
    decoder.send(request_of(prompt_of(lengths[1])))
    for request_id, length in enumerate(lengths):
        want = greedy_reference(model, prompt_of(length), 10 if request_id < 2 else 25)
        assert decoder.wait(request_id).token_ids == want


def test_what_the_fused_pass_serves() -> None:
    fused = {name for name in CONFIGS if Runner(make_model(name))._fused is not None}
    assert fused == {"llama", "llama-gqa", "qwen2"}


def test_a_fused_pass_that_computes_something_else_is_found_out() -> None:
    runner = Runner(make_model("llama-gqa"))
    assert runner._fused is not None
    runner._fused._scale *= 1.01
    with pytest.raises(ModelError, match="gives other logits"):
        check_runner(runner)


def test_an_update_reaches_the_fused_weights() -> None:
    model, other = make_model("qwen2"), make_model("qwen2", seed=1)
    runner = Runner(model)
    WeightUpdate(other.state_dict()).apply(model)
    check_runner(runner)  # against the model's own modules
    ids = torch.tensor([prompt_of(5)])
    assert torch.equal(model(ids).logits, other(ids).logits)


def test_eager_attention_gives_the_same(decoders: Callable[..., LocalDecoder]) -> None:
    model = make_model("llama-gqa")
    want = greedy_reference(model, prompt_of(20), 12)
    model.set_attn_implementation("eager")
    decoder = decoders(model)
    ids = [decoder.send(request_of(prompt_of(20), max_new_tokens=12)) for _ in range(3)]
    assert all(decoder.wait(i).token_ids == want for i in ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(dtype: torch.dtype, decoders: Callable[..., LocalDecoder]) -> None:
    decoder = decoders(make_model("llama").to(dtype))
    done = decoder.wait(decoder.send(request_of(prompt_of(20), temperature=1.0)))
    assert len(done.token_ids) == 10


def small(**fields: Any) -> dict[str, Any]:
    return {k: v for k, v in {**SMALL, **fields}.items() if v is not None}


@pytest.mark.parametrize(
    "config",
    [
        # Positions and biases derived from a 2-D mask; state instead of keys and values.
        pytest.param(transformers.BloomConfig, id="bloom"),
        pytest.param(transformers.MambaConfig, id="mamba"),
    ],
)
def test_an_architecture_that_the_cache_does_not_fit_is_refused(config: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    with pytest.raises(ModelError, match="cannot serve this architecture"):
        check_runner(Runner(model))


def test_padding_is_in_front_and_writes_where_no_token_is() -> None:
    ids, positions, writes = _pad([[1, 2, 3], [4]], [0, 10], 3)
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert positions.tolist() == [[0, 1, 2], [10, 10, 10]]
    assert writes.tolist() == [[0, 1, 2], [11, 11, 10]]


def test_a_model_that_goes_by_its_own_positions_is_refused() -> None:
    """The check is about logits, not only about errors that happen to be raised."""
    model = make_model("qwen3")
    plain = model.forward
    model.forward = lambda **kwargs: plain(**{**kwargs, "position_ids": None})
    with pytest.raises(ModelError, match="gives other logits"):
        check_runner(Runner(model))


def test_sliding_attention_is_served_within_its_window_only() -> None:
    config = transformers.MistralConfig(**small(max_position_embeddings=4096), sliding_window=100)
    with pytest.raises(ModelError, match=r"sliding_attention.*at most the window, 100"):
        served_model_len(config, None)
    assert served_model_len(config, 100) == 100


def test_linear_attention_is_refused_by_name() -> None:
    config = transformers.Qwen3NextConfig(
        **small(), layer_types=["linear_attention", "full_attention"]
    )
    with pytest.raises(ModelError, match="qwen3_next has layers of linear_attention"):
        served_model_len(config, None)


def test_max_model_len_is_the_models_at_most() -> None:
    config = transformers.LlamaConfig(**small())
    assert served_model_len(config, None) == SMALL["max_position_embeddings"]
    with pytest.raises(ModelError, match="max_position_embeddings 2048"):
        served_model_len(config, 2049)
    config = transformers.LlamaConfig(**small(max_position_embeddings=10**6))
    assert served_model_len(config, None) == 4096


def test_a_folder_without_a_model_is_named() -> None:
    with pytest.raises(ModelError, match="nowhere/at/all"):
        load_model("nowhere/at/all", dtype="float32", device=torch.device("cpu"))
