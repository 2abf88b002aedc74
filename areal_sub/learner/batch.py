"""Training samples → padded micro-batches within a token budget. Pure.

Invariants: every trained token of every sample is in exactly one micro-batch; a micro-batch's
padded tokens stay within the budget unless it holds a single sample that alone is longer; the same
samples give the same micro-batches.

Padding is on the right: under causal attention no real position sees a later one, so padding
changes no logprob and needs no attention mask (which would cost the fast attention kernels).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from areal_sub.learner.inputs import Sample
from areal_sub.records import Float32Array


@dataclass(frozen=True, slots=True)
class Scored:
    """A sample and what its tokens are worth."""

    sample: Sample
    advantages: Float32Array  # [L], as the sample's arrays; read where `loss_mask` is set

    @property
    def num_inputs(self) -> int:
        """Tokens that the model must read: up to the one before the last trained token."""
        return int(np.flatnonzero(self.sample.loss_mask)[-1])


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The input of one forward pass, and its N trained tokens."""

    input_ids: Tensor  # int64 [B, T], right-padded with 0
    positions: Tensor  # int64 [N] index into the flattened [B * T]: where each token is predicted
    targets: Tensor  # int64 [N] the trained tokens
    rollout_logprobs: Tensor  # float32 [N]
    advantages: Tensor  # float32 [N]
    num_inputs: int  # tokens of `input_ids` that are not padding

    @property
    def num_trained_tokens(self) -> int:
        return self.targets.numel()

    def to(self, device: torch.device) -> MicroBatch:
        return MicroBatch(
            self.input_ids.to(device),
            self.positions.to(device),
            self.targets.to(device),
            self.rollout_logprobs.to(device),
            self.advantages.to(device),
            self.num_inputs,
        )


def plan_micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of `lengths`, grouped so that `len(group) * longest` stays within `max_tokens`.

    Longest first, so that neighbours have like lengths and padding is small. What alone is longer
    than the budget is alone.
    """
    plan: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if plan and (len(plan[-1]) + 1) * longest <= max_tokens:
            plan[-1].append(index)
        else:
            plan.append([index])
            longest = lengths[index]
    return plan


def collate(items: Sequence[Scored]) -> MicroBatch:
    """One micro-batch of `items`, each of which trains at least one token."""
    width = max(item.num_inputs for item in items)
    input_ids = np.zeros((len(items), width), dtype=np.int64)
    positions, targets, logprobs, advantages = [], [], [], []
    for row, item in enumerate(items):
        sample = item.sample
        trained = np.flatnonzero(sample.loss_mask)
        if trained[0] == 0:
            raise ValueError("the first token of a sample cannot be trained: nothing predicts it")
        input_ids[row, : item.num_inputs] = sample.token_ids[: item.num_inputs]
        positions.append(row * width + trained - 1)
        targets.append(sample.token_ids[trained])
        logprobs.append(sample.rollout_logprobs[trained])
        advantages.append(item.advantages[trained])
    return MicroBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(np.concatenate(positions).astype(np.int64)),
        torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        torch.from_numpy(np.concatenate(logprobs).astype(np.float32)),
        torch.from_numpy(np.concatenate(advantages).astype(np.float32)),
        sum(item.num_inputs for item in items),
    )


def micro_batches(items: Sequence[Scored], max_tokens: int) -> list[MicroBatch]:
    """All of `items` as micro-batches of at most `max_tokens` padded tokens."""
    plan = plan_micro_batches([item.num_inputs for item in items], max_tokens)
    return [collate([items[i] for i in indices]) for indices in plan]
