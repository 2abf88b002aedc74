"""A real Llama of a few thousand parameters, its tokenizer, and hand-made samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from areal_sub.config.schema import ActorConfig
from areal_sub.learner.learner import Learner
from areal_sub.records import Float32Array, float32
from areal_sub.trajectory.samples import RolloutSamples, TrainingSample

VOCAB = 32

MakeSample = Callable[..., TrainingSample]
MakeRollout = Callable[..., RolloutSamples]
LoadLearner = Callable[..., Learner]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


def llama(folder: Path, *, seed: int = 0, **options: Any) -> Path:
    """A tiny Llama with weights large enough that its distributions are far from uniform."""
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_dropout": 0.5,  # must be off while learning
    }
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**(settings | options))).save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 128}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., Path]:
    return llama


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def load_learner(model_folder: Path) -> LoadLearner:
    """`load_learner(path=..., temperature=..., **actor)`: float32, CPU, high learning rate."""

    def load(
        *, path: Path = model_folder, temperature: float = 1.0, seed: int = 1, **actor: Any
    ) -> Learner:
        actor = {"path": str(path), "dtype": "float32", "optimizer": {"lr": 1e-2}} | actor
        return Learner.load(
            ActorConfig.model_validate({"device": "cpu"} | actor),
            path=str(path),
            temperature=temperature,
            total_steps=100,
            seed=seed,
        )

    return load


@pytest.fixture(scope="session")
def make_sample() -> MakeSample:
    """`make_sample(token_ids, trained_positions, logprobs=[one per trained], value=return)`."""

    def make(
        token_ids: Sequence[int],
        trained: Sequence[int],
        *,
        logprobs: Sequence[float] = (),
        value: float = 0.0,
    ) -> TrainingSample:
        length = len(token_ids)
        mask = np.zeros(length, dtype=np.bool_)
        mask[list(trained)] = True
        rollout_logprobs = np.zeros(length, dtype=np.float32)
        rollout_logprobs[list(trained)] = logprobs if len(logprobs) else -1.0
        return TrainingSample(
            rollout_id="r",
            group_id="g",
            token_ids=np.asarray(token_ids, dtype=np.int32),
            loss_mask=mask,
            rollout_logprobs=rollout_logprobs,
            versions=np.where(mask, 0, -1).astype(np.int32),
            returns=np.where(mask, value, 0.0).astype(np.float32),
        )

    return make


@pytest.fixture(scope="session")
def make_rollout(make_sample: MakeSample) -> MakeRollout:
    """`make_rollout(value, (token_ids, trained_positions, logprobs), ...)`: a one-turn rollout."""

    def make(value: float, *samples: Any) -> RolloutSamples:
        return RolloutSamples(
            rollout_id="r",
            group_id="g",
            reward=value,
            turn_returns=float32([value]),
            masked={},
            samples=tuple(
                make_sample(ids, trained, logprobs=logprobs, value=value)
                for ids, trained, logprobs in samples
            ),
        )

    return make


@dataclass(frozen=True)
class Straightforward:
    """The model scored the obvious way: one unpadded sequence at a time, all logits at once."""

    hf: LlamaForCausalLM
    temperature: float

    def logprobs(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Of each token given those before it: [L], 0 for the first. With gradient."""
        ids = torch.tensor(list(token_ids))[None]
        logits = self.hf(input_ids=ids).logits[0, :-1] / self.temperature
        picked = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        return torch.cat([torch.zeros(1), picked])


@pytest.fixture(scope="session")
def straightforward(model_folder: Path) -> Callable[[float], Straightforward]:
    def load(temperature: float) -> Straightforward:
        hf = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
        return Straightforward(hf, temperature)

    return load


@pytest.fixture(scope="session")
def groups(
    make_rollout: MakeRollout, straightforward: Callable[[float], Straightforward]
) -> list[list[RolloutSamples]]:
    """Three groups of ragged rollouts, their logprobs near (not at) the model's own."""
    rng = np.random.default_rng(7)
    score = straightforward(1.0).logprobs

    def one(value: float) -> RolloutSamples:
        samples = []
        for _ in range(int(rng.integers(1, 3))):
            length = int(rng.integers(4, 20))
            ids = rng.integers(0, VOCAB, length)
            trained = sorted(rng.choice(np.arange(1, length), 3, replace=False).tolist())
            with torch.no_grad():
                exact: Float32Array = score(ids.tolist()).numpy()[trained]
            samples.append((ids, trained, exact + rng.normal(0, 0.15, 3)))
        return make_rollout(value, *samples)

    return [[one(v) for v in values] for values in ([1, 0, 0, 1], [0.5, 0.0, 0.25], [1, 1])]
