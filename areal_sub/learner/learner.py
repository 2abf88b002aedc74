"""The learner: groups of finished rollouts in, new weights out.

Owns the policy, the optimizer and the reference model (only with `actor.kl_ctl` > 0). One training
step is `ppo_n_minibatches` optimizer steps, each of which accumulates the gradient of its share of
the samples over micro-batches.

Invariants: what happens depends on weights, samples, step number and seed alone (the order of
minibatches is drawn from seed and step number, nothing else is random), so a restored learner goes
on bit by bit where the device's kernels are deterministic, as the CPU's are; an optimizer step with
a gradient that is not finite is left out and counted; the learner's logprobs are of the
distribution that was sampled from, softmax(logits / temperature).

Called by the trainer, from one thread at a time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from areal_sub.config.schema import ActorConfig
from areal_sub.errors import CheckpointError, ConfigError
from areal_sub.learner.advantage import group_baselines
from areal_sub.learner.batch import MicroBatch, Scored, micro_batches
from areal_sub.learner.durable import whole_file, whole_folder
from areal_sub.learner.inputs import Group
from areal_sub.learner.loss import TokenStats, mean_stats, policy_loss, token_weights, total
from areal_sub.learner.model import DTYPES, PolicyModel, copy_tokenizer
from areal_sub.learner.ratios import interpolated_proximal
from areal_sub.learner.schedule import learning_rate
from areal_sub.records import WEIGHT_PROBE

# Below this, starting threads for an operation costs more than they save.
NUM_SINGLE_THREAD_PARAMETERS = 5_000_000


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


@dataclass(frozen=True, slots=True)
class _Part:
    """A micro-batch on the device, with what was scored before the first update."""

    batch: MicroBatch
    proximal_logprobs: Tensor | None
    ref_logprobs: Tensor | None


class Learner:
    """Use `Learner.load`. `num_steps` training steps have been taken."""

    def __init__(
        self,
        actor: ActorConfig,
        policy: PolicyModel,
        reference: PolicyModel | None,
        *,
        temperature: float,
        total_steps: int,
        seed: int,
    ) -> None:
        self._actor = actor
        self._policy = policy
        self._reference = reference
        self._temperature = temperature
        self._total_steps = total_steps
        self._seed = seed
        self._num_threads = actor.num_threads or (
            1 if policy.num_parameters < NUM_SINGLE_THREAD_PARAMETERS else None
        )
        self.num_steps = 0
        # Norms' weights and biases are vectors, what should decay are matrices.
        parameters = list(policy.hf.parameters())
        self._parameters = parameters
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": [p for p in parameters if p.ndim >= 2],
                    "weight_decay": actor.optimizer.weight_decay,
                },
                {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=actor.optimizer.lr,
            betas=(actor.optimizer.beta1, actor.optimizer.beta2),
            eps=actor.optimizer.eps,
        )

    @classmethod
    def load(
        cls, actor: ActorConfig, *, path: str, temperature: float, total_steps: int, seed: int
    ) -> Learner:
        """Load the policy from `path`, and the reference from `actor.path` where one is needed.

        `temperature`: what training tokens are sampled at. `total_steps`: training steps of the
        run, for the learning rate schedule. Raises `ModelError`, `ConfigError`.
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
        device = _resolve_device(actor.device)
        policy = PolicyModel.load(
            path,
            dtype=actor.dtype,
            device=device,
            gradient_checkpointing=actor.gradient_checkpointing,
        )
        reference = None
        if actor.kl_ctl > 0:
            reference = PolicyModel.load(actor.path, dtype=actor.dtype, device=device)
            reference.freeze()
        return cls(
            actor,
            policy,
            reference,
            temperature=temperature,
            total_steps=total_steps,
            seed=seed,
        )

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
        lr = learning_rate(
            self.num_steps, total_steps=self._total_steps, optimizer=self._actor.optimizer
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        minibatches = [self._prepare(items) for items in self._minibatches(scored)]

        stats: list[TokenStats] = []
        grad_norms: list[float] = []
        num_skipped = 0
        for parts in minibatches:
            stats.append(self._accumulate(parts))
            grad_norms.append(self._update())
            num_skipped += not np.isfinite(grad_norms[-1])
        mismatch = mean_stats(stats[0])
        self.num_steps += 1

        mean = mean_stats(total(stats))
        batches = [part.batch for parts in minibatches for part in parts]
        advantages = torch.cat([b.advantages for b in batches])
        return StepStats(
            loss=mean.loss,
            grad_norm=float(np.mean(grad_norms)),
            learning_rate=lr,
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
            num_optimizer_steps=len(minibatches),
            num_skipped_steps=num_skipped,
            wall_s=time.monotonic() - started_at,
        )

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

    def _minibatches(self, scored: Sequence[Scored]) -> list[list[Scored]]:
        order = np.random.default_rng([self._seed, self.num_steps]).permutation(len(scored))
        shares = np.array_split(order, min(self._actor.ppo_n_minibatches, len(scored)))
        return [[scored[i] for i in share] for share in shares]

    @torch.no_grad()
    def _prepare(self, items: Sequence[Scored]) -> list[_Part]:
        actor, parts = self._actor, []
        max_tokens = actor.mb_spec.max_tokens_per_mb
        recompute = actor.use_decoupled_loss and actor.prox_logp_method == "recompute"
        for batch in micro_batches(items, max_tokens, pack=self._policy.packs):
            batch = batch.to(self._policy.device)
            proximal = ref = None
            if recompute:
                proximal = self._policy.score(batch, temperature=self._temperature).logprobs
            if self._reference is not None:
                ref = self._reference.score(batch, temperature=self._temperature).logprobs
            parts.append(_Part(batch, proximal, ref))
        return parts

    def _accumulate(self, parts: Sequence[_Part]) -> TokenStats:
        """Add the gradient of one optimizer batch."""
        actor = self._actor
        num_tokens = sum(part.batch.num_trained_tokens for part in parts)
        num_sequences = sum(part.batch.num_sequences for part in parts)
        out = []
        for part in parts:
            batch = part.batch
            scores = self._policy.score(batch, temperature=self._temperature)
            proximal = part.proximal_logprobs
            if actor.use_decoupled_loss and actor.prox_logp_method == "loglinear":
                proximal = interpolated_proximal(
                    scores.logprobs, batch.rollout_logprobs, batch.versions, self.num_steps
                )
            loss, stats = policy_loss(
                actor,
                trainer_logprobs=scores.logprobs,
                rollout_logprobs=batch.rollout_logprobs,
                advantages=batch.advantages,
                entropies=scores.entropies,
                sequences=batch.sequences,
                num_sequences=batch.num_sequences,
                weights=token_weights(
                    actor,
                    batch.sequences,
                    batch.num_sequences,
                    num_batch_tokens=num_tokens,
                    num_batch_sequences=num_sequences,
                ),
                proximal_logprobs=proximal,
                ref_logprobs=part.ref_logprobs,
            )
            loss.backward()  # type: ignore[no-untyped-call]
            out.append(stats)
        return total(out)

    def _update(self) -> float:
        """Clip and apply the gradient, unless it is not finite. Returns its norm before."""
        norm = float(
            torch.nn.utils.clip_grad_norm_(
                self._parameters, self._actor.optimizer.gradient_clipping
            )
        )
        if np.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def export_weights(self, path: Path, dtype: str) -> None:
        """Write one safetensors file for the engine: Hugging Face names, tied weights once,
        floats in `dtype` ("float32", "bfloat16", "float16"). Atomic.

        Its metadata hold a sequence with its logprobs under these weights, so that an engine can
        be asked whether it computes the same."""
        token_ids, logprobs = self._policy.probe()
        probe = json.dumps({"token_ids": token_ids, "logprobs": logprobs})
        with whole_file(path) as partial:
            save_file(self._policy.weights(DTYPES[dtype]), partial, {WEIGHT_PROBE: probe})

    def save_pretrained(self, folder: Path, tokenizer_path: str) -> None:
        """Write a Hugging Face model folder in `actor.dtype` with the tokenizer's files. Atomic."""
        with whole_folder(folder) as partial:
            self._policy.save(partial, dtype=self._actor.dtype)
            copy_tokenizer(tokenizer_path, partial)

    def save_master(self, folder: Path) -> None:
        """Fill `folder` with the float32 weights, for `Learner.load` to go on from."""
        self._policy.save(folder, dtype="float32")

    def state_dict(self) -> dict[str, Any]:
        """All of the learner that is not weights: tensors and plain values."""
        return {
            "num_steps": self.num_steps,
            "optimizer": self.optimizer.state_dict(),
            "torch_rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises `CheckpointError` where `state` is of another model or optimizer."""
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.num_steps = int(state["num_steps"])
            torch.set_rng_state(state["torch_rng"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"the learner's state does not fit this model: {error}"
            ) from error


def _resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"actor.device={name!r} cannot be used here: {error}") from error
    return device
