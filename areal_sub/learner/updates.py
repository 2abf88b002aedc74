"""One training step, as each of the learner's processes takes it (see `ranks`): minibatches, this
rank's share of their micro-batches, gradients, and the optimizer.

Owns the optimizer and the number of steps taken. What a step does depends on weights, samples, step
number and seed alone. Called by `learner`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from areal_sub.config.schema import ActorConfig
from areal_sub.learner.batch import MicroBatch, Scored, micro_batches
from areal_sub.learner.loss import TokenStats, policy_loss, token_weights, total
from areal_sub.learner.model import BasePolicy, PolicyModel
from areal_sub.learner.ranks import Ranks, shard_like, whole
from areal_sub.learner.ratios import interpolated_proximal
from areal_sub.learner.schedule import learning_rate


@dataclass(frozen=True, slots=True)
class _Part:
    """A micro-batch on the device, with what was scored before the first update."""

    batch: MicroBatch
    proximal_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    counts: bool  # False: only computed because all ranks must compute equally often


@dataclass(frozen=True, slots=True)
class _Minibatch:
    """What one optimizer step learns from."""

    batches: list[MicroBatch]  # of all ranks
    parts: list[_Part]  # this rank's share


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What one training step did, the same in each rank."""

    stats: TokenStats
    first_stats: TokenStats  # of the first minibatch, before any update
    grad_norms: list[float]  # of each optimizer step
    learning_rate: float
    batches: list[MicroBatch]


class Updates:
    """The policy's training. `num_steps` training steps have been taken."""

    def __init__(
        self,
        actor: ActorConfig,
        policy: PolicyModel,
        reference: PolicyModel | BasePolicy | None,
        *,
        temperature: float,
        total_steps: int,
        seed: int,
        ranks: Ranks | None,
    ) -> None:
        self._actor = actor
        self._ranks = ranks
        self._policy = policy
        self._reference = reference
        self._temperature = temperature
        self._total_steps = total_steps
        self._seed = seed
        self.num_steps = 0
        # Norms' weights and biases are vectors, what should decay are matrices.
        parameters = [p for p in policy.hf.parameters() if p.requires_grad]
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

    def train(self, scored: Sequence[Scored]) -> Trained:
        """One training step on `scored`; each rank does its share, and all know the result."""
        lr = learning_rate(
            self.num_steps, total_steps=self._total_steps, optimizer=self._actor.optimizer
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        minibatches = [self._prepare(items) for items in self._minibatches(scored)]
        stats: list[TokenStats] = []
        grad_norms: list[float] = []
        for minibatch in minibatches:
            stats.append(self._accumulate(minibatch))
            grad_norms.append(self._update())
        self.num_steps += 1
        return Trained(
            stats=self._of_all_ranks(total(stats)),
            first_stats=self._of_all_ranks(stats[0]),
            grad_norms=grad_norms,
            learning_rate=lr,
            batches=[batch for minibatch in minibatches for batch in minibatch.batches],
        )

    def _of_all_ranks(self, stats: TokenStats) -> TokenStats:
        if self._ranks is None:
            return stats
        return TokenStats(sums=self._ranks.sum(stats.sums), maxima=self._ranks.max(stats.maxima))

    def _minibatches(self, scored: Sequence[Scored]) -> list[list[Scored]]:
        order = np.random.default_rng([self._seed, self.num_steps]).permutation(len(scored))
        shares = np.array_split(order, min(self._actor.ppo_n_minibatches, len(scored)))
        return [[scored[i] for i in share] for share in shares]

    @torch.no_grad()
    def _prepare(self, items: Sequence[Scored]) -> _Minibatch:
        actor = self._actor
        max_tokens = actor.mb_spec.max_tokens_per_mb
        recompute = actor.use_decoupled_loss and actor.prox_logp_method == "recompute"
        batches = micro_batches(items, max_tokens, pack=self._policy.packs)
        parts = []
        for batch, counts in self._share(batches):
            self._note("a forward pass before the first update")
            batch = batch.to(self._policy.device)
            proximal = ref = None
            if recompute:
                proximal = self._policy.score(batch, temperature=self._temperature).logprobs
            if self._reference is not None:
                ref = self._reference.score(batch, temperature=self._temperature).logprobs
            parts.append(_Part(batch, proximal, ref, counts))
        return _Minibatch(batches, parts)

    def _share(self, batches: list[MicroBatch]) -> list[tuple[MicroBatch, bool]]:
        """This rank's micro-batches, equally many for each rank, and which of them count."""
        if self._ranks is None:
            return [(batch, True) for batch in batches]
        num_ranks = self._ranks.num_ranks
        # The last ones are the shortest: computed once more, for the others' sake.
        missing = [(batches[-1], False)] * (-len(batches) % num_ranks)
        return [*((batch, True) for batch in batches), *missing][self._ranks.rank :: num_ranks]

    def _note(self, what: str) -> None:
        if self._ranks is not None:
            self._ranks.note(f"step {self.num_steps + 1}: {what}")

    def _accumulate(self, minibatch: _Minibatch) -> TokenStats:
        """Add the gradient of one optimizer batch. The statistics are of this rank's share."""
        actor = self._actor
        num_tokens = sum(batch.num_trained_tokens for batch in minibatch.batches)
        num_sequences = sum(batch.num_sequences for batch in minibatch.batches)
        out = []
        for number, part in enumerate(minibatch.parts):
            self._note(f"micro-batch {number}")
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
            if self._ranks is not None:
                loss = loss * self._ranks.num_ranks  # FSDP takes the mean over ranks
            if not part.counts:
                loss, stats = loss * 0.0, stats.nothing()
            loss.backward()  # type: ignore[no-untyped-call]
            out.append(stats)
        return total(out)

    def _update(self) -> float:
        """Clip and apply the gradient, unless it is not finite. Returns its norm before."""
        self._note("the optimizer step")
        limit = self._actor.optimizer.gradient_clipping
        norm = float(whole(torch.nn.utils.clip_grad_norm_(self._parameters, limit)))
        if np.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def whole_optimizer(self) -> dict[str, Any]:
        """Its state, gathered on the CPU where it is sharded. All ranks must call it."""
        state = self.optimizer.state_dict()
        whole_state = {
            index: {k: whole(v).cpu() if self._ranks else v for k, v in values.items()}
            for index, values in state["state"].items()
        }
        return {**state, "state": whole_state}

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """A state as of `whole_optimizer`, of any number of ranks. Each rank loads by itself."""
        if self._ranks is not None:
            state = {**state, "state": self._sharded(state["state"])}
        self.optimizer.load_state_dict(state)

    def _sharded(self, state: dict[int, dict[str, Tensor]]) -> dict[int, dict[str, Tensor]]:
        """This rank's shards of the optimizer's whole tensors."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return {
            index: {name: shard_like(value, parameters[index]) for name, value in values.items()}
            for index, values in state.items()
        }
