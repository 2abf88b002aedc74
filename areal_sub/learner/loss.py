"""The policy loss over trained tokens, and what to watch about it. Pure functions over tensors.

With ratio = π / π_behaviour, where the behaviour policy is the sampler, or with
`use_decoupled_loss` the proximal policy (the learner before this training step):

    objective=ppo     -min(ratio · A, clip(ratio, 1-ε, 1+ε_higher) · A)       arXiv:1707.06347
                      ε_higher: DAPO's clip-higher, arXiv:2503.14476
                      c_clip: at A < 0 no loss beyond c_clip · |A|, dual clip, arXiv:1912.09729
    objective=cispo   -sg(clip(ratio, 1-ε, 1+ε_higher)) · A · log π           arXiv:2506.13585

`importance_sampling_level=sequence` puts the geometric mean over the sequence in the place of each
token's ratio: GSPO (arXiv:2507.18071) in its token form, whose gradient is that of GSPO where all
tokens of a sequence have one advantage.

Decoupled (AReaL, arXiv:2505.24298): times the weight proximal / sampler, without gradient, after
`rejection_sampling` (see `ratios`). A rejected token gives no gradient at all; it still counts in
the normalisation, so that a batch of which little is kept moves the policy less, not louder.

Plus, optionally, `kl_ctl` times an estimate of KL(π || reference).

Normalisation (`token_weights`) is by the *whole* optimizer batch, so the gradient does not depend
on how the batch was cut up.

Logprobs are of the distribution after temperature. Where the sampler also truncates (top_p, top_k)
its logprobs are of the renormalised rest, and the ratio carries that difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from areal_sub.config.schema import ActorConfig
from areal_sub.learner.ratios import (
    behaviour_weights,
    clamped,
    k3,
    kl_penalty,
    lengths,
    per_sequence,
)

_SUMS = (
    "loss", "num_clipped", "num_masked", "ratio", "weight", "weight_squared", "entropy",
    "kl_rollout", "delta", "kl_ref",
)  # fmt: skip
_MAXIMA = ("delta", "ratio", "weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStats:
    """Over trained tokens. Detached tensors, on the model's device; parts are added up (`sums`) or
    compared (`maxima`), also over processes."""

    sums: Tensor  # float64, in the order of `_SUMS`, and then the number of tokens
    maxima: Tensor  # float64, in the order of `_MAXIMA`

    def nothing(self) -> TokenStats:
        """Of no token."""
        return TokenStats(
            sums=torch.zeros_like(self.sums), maxima=torch.full_like(self.maxima, -torch.inf)
        )


def policy_loss(
    actor: ActorConfig,
    *,
    trainer_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    entropies: Tensor,
    sequences: Tensor,
    num_sequences: int,
    weights: Tensor,
    proximal_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
) -> tuple[Tensor, TokenStats]:
    """Loss of one micro-batch (0-d, with gradient), and its statistics.

    All tensors are float32 [N], one entry per trained token, but for `sequences` (see `ratios`);
    gradient flows through `trainer_logprobs` only. `weights`: of `token_weights`.
    `proximal_logprobs`: given where, and only where, the loss is decoupled.
    """
    advantages = advantages.detach()
    behaviour = rollout_logprobs if proximal_logprobs is None else proximal_logprobs
    log_ratio = clamped(trainer_logprobs - behaviour.detach())
    if actor.importance_sampling_level == "sequence":
        means = per_sequence(log_ratio.detach(), sequences, num_sequences, "mean")[sequences]
        log_ratio = means + (log_ratio - log_ratio.detach())
    ratio = log_ratio.exp()
    higher = actor.eps_clip if actor.eps_clip_higher is None else actor.eps_clip_higher
    bounded = ratio.clamp(1.0 - actor.eps_clip, 1.0 + higher)
    if actor.objective == "cispo":
        losses = -bounded.detach() * advantages * trainer_logprobs
        clipped = bounded != ratio
    else:
        unclipped, losses = -ratio * advantages, -bounded * advantages
        clipped = losses > unclipped
        losses = torch.maximum(unclipped, losses)
        if actor.c_clip is not None:
            ceiling = -actor.c_clip * advantages
            too_far = (advantages < 0) & (losses > ceiling)
            losses = torch.where(too_far, ceiling, losses)
            clipped = clipped | too_far
    if proximal_logprobs is None:
        importance, kept = ratio.detach(), torch.ones_like(clipped)
    else:
        importance, kept = behaviour_weights(
            proximal_logprobs, rollout_logprobs, sequences, num_sequences, actor.rejection_sampling
        )
        losses = losses * importance
    kl_ref = torch.zeros_like(losses)
    if ref_logprobs is not None:
        kl_ref = kl_penalty(trainer_logprobs, ref_logprobs, actor.kl_estimator)
        losses = losses + actor.kl_ctl * kl_ref
    losses = torch.where(kept, losses, 0.0)
    with torch.no_grad():
        distance = trainer_logprobs - rollout_logprobs
        delta = distance.abs()
        values = {
            "loss": losses,
            "num_clipped": clipped & kept,
            "num_masked": ~kept,
            "ratio": ratio,
            "weight": importance,
            "weight_squared": importance.square(),
            "entropy": entropies,
            "kl_rollout": k3(clamped(distance)),
            "delta": delta,
            "kl_ref": kl_ref,
        }
        sums = [values[name].double().sum() for name in _SUMS]
        stats = TokenStats(
            sums=torch.stack([*sums, sums[0].new_tensor(losses.numel())]),
            maxima=torch.stack([values[name].max().double() for name in _MAXIMA]),
        )
    return (losses * weights).sum(), stats


def token_weights(
    actor: ActorConfig,
    sequences: Tensor,
    num_sequences: int,
    *,
    num_batch_tokens: int,
    num_batch_sequences: int,
) -> Tensor:
    """What each trained token counts in the loss, float32 [N], by `actor.loss_agg_mode`.

    token_mean      1 / tokens of the optimizer batch: every token weighs the same (DAPO)
    sequence_mean   1 / (sequences · tokens of its sequence): every sequence does (GRPO, GSPO)
    constant        1 / (sequences · `loss_agg_constant`): neither length changes a token's weight
                    (Dr. GRPO, arXiv:2503.20783)
    """
    match actor.loss_agg_mode:
        case "token_mean":
            weights = torch.full_like(sequences, 1, dtype=torch.float32) / num_batch_tokens
        case "sequence_mean":
            of_sequence = lengths(sequences, num_sequences).float() * num_batch_sequences
            weights = 1.0 / of_sequence[sequences]
        case "constant":
            assert actor.loss_agg_constant is not None  # the schema sees to it
            scale = num_batch_sequences * actor.loss_agg_constant
            weights = torch.full_like(sequences, 1, dtype=torch.float32) / scale
    return weights


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanStats:
    """`TokenStats` per token."""

    num_tokens: int
    loss: float  # without the normalisation
    clip_fraction: float  # tokens whose gradient, or with CISPO whose weight, the clip changed
    masked_share: float  # tokens that `rejection_sampling` rejected
    ratio: float  # of the clipped objective, before clipping
    max_ratio: float
    weight: float  # importance weight against the sampler: decoupled after rejection, else `ratio`
    max_weight: float
    effective_share: float  # (Σ weight)² / (N · Σ weight²): effective sample size over N
    entropy: float  # nats
    kl_rollout: float  # k3 of KL(sampler || learner), nats
    mean_delta: float  # |trainer_logprobs - rollout_logprobs|
    max_delta: float
    kl_ref: float  # KL(learner || reference), nats; 0 without a reference


def total(parts: Sequence[TokenStats]) -> TokenStats:
    """Of all tokens of `parts`, at least one."""
    return TokenStats(
        sums=torch.stack([p.sums for p in parts]).sum(0),
        maxima=torch.stack([p.maxima for p in parts]).amax(0),
    )


def mean_stats(stats: TokenStats) -> MeanStats:
    """Waits for the device once."""
    values: list[float] = torch.cat([stats.sums, stats.maxima]).tolist()
    num_tokens = values[len(_SUMS)]
    mean = {name: value / num_tokens for name, value in zip(_SUMS, values, strict=False)}
    most = dict(zip(_MAXIMA, values[len(_SUMS) + 1 :], strict=True))
    squares = mean["weight_squared"]
    return MeanStats(
        num_tokens=round(num_tokens),
        loss=mean["loss"],
        clip_fraction=mean["num_clipped"],
        masked_share=mean["num_masked"],
        ratio=mean["ratio"],
        max_ratio=most["ratio"],
        weight=mean["weight"],
        max_weight=most["weight"],
        effective_share=mean["weight"] ** 2 / squares if squares else 0.0,
        entropy=mean["entropy"],
        kl_rollout=mean["kl_rollout"],
        mean_delta=mean["delta"],
        max_delta=most["delta"],
        kl_ref=mean["kl_ref"],
    )
