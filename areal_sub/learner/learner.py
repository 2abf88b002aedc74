"""The learner: groups of finished rollouts in, new weights out.

Owns the policy and the reference model (only with `actor.kl_ctl` > 0; with `actor.lora` that is the
policy with its adapter off). One training step is
`ppo_n_minibatches` optimizer steps, each of which accumulates the gradient of its share of the
samples over micro-batches (`updates`).

Invariants: what happens depends on weights, samples, step number and seed alone (the order of
minibatches is drawn from seed and step number, nothing else is random), so a restored learner goes
on bit by bit where the device's kernels are deterministic, as the CPU's are; an optimizer step with
a gradient that is not finite is left out and counted; the learner's logprobs are of the
distribution that was sampled from, softmax(logits / temperature).

With `ranks`, this is one of several processes (`ranks.py`): each accumulates its share of the
micro-batches over its shard of the weights. Rank 0 is the trainer's, and tells the others what
to do (`follow`). The gradient is that of one process to rounding; what is saved is whole, and good
for any number of ranks.

Called by the trainer, from one thread at a time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from areal_sub.config.schema import ActorConfig
from areal_sub.errors import CheckpointError, ConfigError
from areal_sub.learner.advantage import group_baselines
from areal_sub.learner.batch import Scored, pack_scored, unpack_scored
from areal_sub.learner.durable import whole_file, whole_folder
from areal_sub.learner.inputs import Group
from areal_sub.learner.loss import mean_stats
from areal_sub.learner.model import DTYPES, BasePolicy, PolicyModel, copy_tokenizer
from areal_sub.learner.ranks import RankPlace, Ranks
from areal_sub.learner.updates import Updates
from areal_sub.learner.weights_file import write_weights
from areal_sub.records import WEIGHT_ADAPTER, WEIGHT_PROBE

# Below this, starting threads for an operation costs more than they save.
NUM_SINGLE_THREAD_PARAMETERS = 5_000_000
ADAPTER_FOLDER = "adapter"
# Mean difference of a probe's logprobs, in nats, that another device or library can make.
BASE_TOLERANCE = {"float32": 2e-3, "bfloat16": 0.25}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """One training step. Means are per trained token."""

    loss: float
    grad_norm: float  # before clipping; mean of the optimizer steps
    learning_rate: float
    ratio: float  # mean importance ratio that was clipped
    ratio_max: float
    clip_fraction: float  # tokens whose gradient the clip changed
    weight: float  # mean importance weight against the sampler; see `loss.MeanStats`
    weight_max: float
    masked_share: float  # tokens that `actor.rejection_sampling` rejected
    effective_share: float  # effective sample size of the weights, as a share of the tokens
    entropy: float  # nats
    kl_ref: float  # KL(learner || reference) by `actor.kl_estimator`, nats; 0 without a reference
    kl_rollout: float
    """k3 of KL(sampler || learner), nats. This and `logprob_delta_*` are measured before the first
    optimizer step, so that they show staleness and numerics, not what this step learned."""
    logprob_delta_mean: float  # mean |trainer_logprobs - rollout_logprobs|
    logprob_delta_max: float
    advantage_abs_mean: float
    num_groups: int
    num_degenerate_groups: int  # all rollouts did equally well: nothing to learn
    num_rollouts: int
    num_samples: int
    num_trained_tokens: int
    num_input_tokens: int  # read by the model, padding left out
    num_padded_tokens: int  # read by the model, padding included
    num_micro_batches: int
    num_optimizer_steps: int
    num_skipped_steps: int  # of those: left out, as the gradient was not finite
    wall_s: float


class Learner:
    """Use `Learner.load`. `num_steps` training steps have been taken."""

    def __init__(
        self,
        actor: ActorConfig,
        policy: PolicyModel,
        updates: Updates,
        ranks: Ranks | None,
    ) -> None:
        self._actor = actor
        self._policy = policy
        self._updates = updates
        self._ranks = ranks
        self._num_threads = actor.num_threads or (
            1 if policy.num_parameters < NUM_SINGLE_THREAD_PARAMETERS else None
        )

    @property
    def num_steps(self) -> int:
        return self._updates.num_steps

    @property
    def has_adapter(self) -> bool:
        """It trains an adapter: what `state_dict` gives is all that a step changes."""
        return self._policy.adapter is not None

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._updates.optimizer

    @classmethod
    def load(
        cls,
        actor: ActorConfig,
        *,
        path: str,
        temperature: float,
        total_steps: int,
        seed: int,
        place: RankPlace | None = None,
    ) -> Learner:
        """Load the policy from `path`, and the reference from `actor.path` where one is needed.
        With `actor.lora`, `path` is the base, and always the run's first model.

        `temperature`: what training tokens are sampled at. `total_steps`: training steps of the
        run, for the learning rate schedule. `place`: with several processes, each of which loads;
        waits for all of them. Raises `ModelError`, `ConfigError`, `LearnerRankError`.
        """
        if temperature <= 0:
            raise ConfigError(
                f"gconfig.temperature is {temperature}: greedy sampling has no distribution to "
                "learn from; set it above 0 for training"
            )
        if actor.dtype == "float16":
            raise ConfigError(
                "actor.dtype=float16: gradients underflow in it; use bfloat16 or float32 "
                "(engine.dtype may be float16)"
            )
        device = _resolve_device(actor.device, place.rank if place else 0)
        policy = PolicyModel.load(
            path,
            dtype=actor.dtype,
            device=device,
            gradient_checkpointing=actor.gradient_checkpointing,
            lora=actor.lora,
            seed=seed,
        )
        reference: PolicyModel | BasePolicy | None = None
        if actor.kl_ctl > 0 and policy.adapter is not None:
            reference = BasePolicy(policy, policy.adapter)
        elif actor.kl_ctl > 0:
            reference = PolicyModel.load(actor.path, dtype=actor.dtype, device=device)
            reference.freeze()
        ranks = None
        if place is not None:
            ranks = Ranks.join(place, device)
            for model in (policy, reference):
                if isinstance(model, PolicyModel):
                    model.shard(ranks.mesh)
        updates = Updates(
            actor,
            policy,
            reference,
            temperature=temperature,
            total_steps=total_steps,
            seed=seed,
            ranks=ranks,
        )
        return cls(actor, policy, updates, ranks)

    def step(self, groups: Sequence[Group]) -> StepStats:
        """Learn from `groups` of sibling rollouts. One training step.

        Raises `ValueError` where there is not one token to train.
        """
        started_at = time.monotonic()
        if self._num_threads is not None:
            # In each step, as the number belongs to the calling thread in some builds of torch.
            torch.set_num_threads(self._num_threads)
        scored, num_degenerate = self._score_groups(groups)
        if not scored:
            raise ValueError("none of the rollouts has a token to train")
        with self._leading("step", samples=pack_scored(scored) if self._ranks else None):
            trained = self._updates.train(scored)
        mean, mismatch = mean_stats(trained.stats), mean_stats(trained.first_stats)
        batches = trained.batches
        advantages = torch.cat([b.advantages for b in batches])
        return StepStats(
            loss=mean.loss,
            grad_norm=float(np.mean(trained.grad_norms)),
            learning_rate=trained.learning_rate,
            ratio=mean.ratio,
            ratio_max=mean.max_ratio,
            clip_fraction=mean.clip_fraction,
            weight=mean.weight,
            weight_max=mean.max_weight,
            masked_share=mean.masked_share,
            effective_share=mean.effective_share,
            entropy=mean.entropy,
            kl_ref=mean.kl_ref,
            kl_rollout=mismatch.kl_rollout,
            logprob_delta_mean=mismatch.mean_delta,
            logprob_delta_max=mismatch.max_delta,
            advantage_abs_mean=float(advantages.abs().mean()),
            num_groups=len(groups),
            num_degenerate_groups=num_degenerate,
            num_rollouts=sum(len(group) for group in groups),
            num_samples=len(scored),
            num_trained_tokens=mean.num_tokens,
            num_input_tokens=sum(b.num_inputs for b in batches),
            num_padded_tokens=sum(b.input_ids.numel() for b in batches),
            num_micro_batches=len(batches),
            num_optimizer_steps=len(trained.grad_norms),
            num_skipped_steps=sum(not np.isfinite(norm) for norm in trained.grad_norms),
            wall_s=time.monotonic() - started_at,
        )

    def follow(self, recovery: Path | None = None) -> NoReturn:
        """A rank that is not 0: do what rank 0 says, until it is gone, which is an error here.

        `recovery`: the `learner.pt` that rank 0 goes on from.
        """
        assert self._ranks is not None
        if recovery is not None:
            self.load_state_dict(torch.load(recovery, map_location="cpu", weights_only=True))
        while True:
            command = self._ranks.receive()
            with self._ranks.blaming():
                match command["do"]:
                    case "step":
                        self._updates.train(unpack_scored(command["samples"]))
                    case "probe":
                        self._policy.probe()
                    case "weights":
                        self._policy.gather()
                    case "state":
                        self._updates.whole_optimizer()

    def close(self) -> None:
        """Leave the other ranks, which end by themselves. Nothing may be called after it."""
        if self._ranks is not None:
            self._ranks.leave()
            self._ranks = None

    @contextmanager
    def _leading(self, what: str, **data: Any) -> Iterator[None]:
        """Have the other ranks do their part of `what` in the meantime."""
        if self._ranks is None:
            yield
            return
        with self._ranks.blaming():
            self._ranks.send({"do": what, **data})
            yield
            self._ranks.note(f"after {what!r} in step {self.num_steps}")

    def _score_groups(self, groups: Sequence[Group]) -> tuple[list[Scored], int]:
        """All samples with their advantages, and the number of degenerate groups."""
        scored: list[Scored] = []
        num_degenerate = 0
        baselines = group_baselines(
            [[r.mean_return for r in group] for group in groups], self._actor.adv_norm
        )
        for group, baseline in zip(groups, baselines, strict=True):
            num_degenerate += baseline.degenerate
            scored += [
                Scored(sample, baseline.advantages(sample.returns))
                for rollout in group
                for sample in rollout.samples
                if sample.loss_mask.any()
            ]
        return scored, num_degenerate

    def _weights(self, dtype: str) -> dict[str, Tensor]:
        with self._leading("weights"):
            return self._policy.weights(DTYPES[dtype])

    def export_weights(self, path: Path, dtype: str) -> None:
        """Write one safetensors file for the engine: Hugging Face names, tied weights once,
        floats in `dtype` ("float32", "bfloat16", "float16"). Atomic.

        Its metadata hold a sequence with its logprobs under these weights, so that an engine can
        be asked whether it computes the same."""
        self._export(path, self._weights(dtype))

    def export_adapter(self, path: Path, dtype: str) -> None:
        """Like `export_weights`, of the adapter alone, under the names of peft's files, and with
        its settings in the metadata."""
        assert self._policy.adapter is not None
        adapter = self._policy.adapter
        self._export(path, adapter.tensors(DTYPES[dtype]), {WEIGHT_ADAPTER: adapter.settings()})

    def _export(
        self, path: Path, weights: dict[str, Tensor], metadata: dict[str, str] | None = None
    ) -> None:
        with self._leading("probe"):
            token_ids, logprobs = self._policy.probe()
        probe = json.dumps({"token_ids": token_ids, "logprobs": logprobs})
        with whole_file(path) as partial:
            write_weights(partial, weights, {WEIGHT_PROBE: probe, **(metadata or {})})

    def save_pretrained(self, folder: Path, tokenizer_path: str) -> None:
        """Write a Hugging Face model folder in `actor.dtype` with the tokenizer's files. Atomic.

        An adapter is merged into it, and by itself in the folder `adapter`, as peft writes it."""
        dtype = self._actor.dtype
        weights = self._weights(dtype)
        with whole_folder(folder) as partial:
            self._policy.save(partial, weights, dtype=dtype)
            copy_tokenizer(tokenizer_path, partial)
            if self._policy.adapter is not None:
                self._policy.adapter.save(partial / ADAPTER_FOLDER)

    def save_master(self, folder: Path) -> None:
        """Fill `folder` with the float32 weights, for `Learner.load` to go on from."""
        self._policy.save(folder, self._weights("float32"), dtype="float32")

    def state_dict(self) -> dict[str, Any]:
        """All of the learner that is not the model's weights: tensors, whole, and plain values.

        With an adapter, also what its policy says of a fixed sequence, by which another base is
        known when it is loaded."""
        with self._leading("state"):
            optimizer = self._updates.whole_optimizer()
        state = {
            "num_steps": self.num_steps,
            "optimizer": optimizer,
            "torch_rng": torch.get_rng_state(),
        }
        if (adapter := self._policy.adapter) is not None:
            state |= {"adapter": adapter.tensors(), "probe": self._policy.probe()[1]}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """`state`: of `state_dict`, of any number of ranks. Each rank loads by itself.

        Raises `CheckpointError` where `state` is of another model or optimizer.
        """
        adapter = self._policy.adapter
        if (adapter is None) != (state.get("adapter") is None):
            raise CheckpointError(
                f"the learner's state is of a run with{'' if adapter is None else 'out'} "
                "actor.lora, which cannot be changed in mid-run"
            )
        try:
            if adapter is not None:
                adapter.load(state["adapter"])
                self._check_base(state["probe"])
            self._updates.load_optimizer(state["optimizer"])
            self._updates.num_steps = int(state["num_steps"])
            torch.set_rng_state(state["torch_rng"])
        except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
            raise CheckpointError(
                f"the learner's state does not fit this model: {error}"
            ) from error

    def _check_base(self, said: list[float]) -> None:
        """Raises `CheckpointError` where the policy did not say `said` of the probe."""
        _, says = self._policy.probe()
        difference = sum(abs(a - b) for a, b in zip(says, said, strict=True)) / len(said)
        if not difference <= BASE_TOLERANCE[self._actor.dtype]:
            raise CheckpointError(
                f"the adapter was trained over another model than {self._actor.path!r}: the two "
                f"together give logprobs that are {difference:.3g} nats on average from before"
            )


def _resolve_device(name: str, rank: int) -> torch.device:
    """Each rank has a GPU of its own, unless one is named by its number."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if name == "cuda":
            device = torch.device("cuda", rank)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"actor.device={name!r} cannot be used here: {error}") from error
    return device
