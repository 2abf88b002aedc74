"""The policy loss over trained tokens, and what to watch about it. Pure functions over tensors.

PPO-clip (arXiv:1707.06347) per token, with the sampler's own logprobs as the behaviour policy:

    ratio = π / π_rollout             loss = -min(ratio · A, clip(ratio, 1-ε, 1+ε_higher) · A)

Decoupled (AReaL, arXiv:2505.24298): the clip is around the proximal policy, which is the learner
before this training step, and the distance from sampler to it becomes a weight without gradient:

    ratio = π / π_proximal            loss = -(π_proximal / π_rollout) · min(...)

plus, optionally, `kl_ctl` times the k3 estimate of KL(π || reference).

Normalisation: the sum over tokens, divided by the trained tokens of the *whole* optimizer batch.
So every token weighs the same, and the gradient does not depend on how the batch was cut up.

Logprobs are of the distribution after temperature. Where the sampler also truncates (top_p, top_k)
its logprobs are of the renormalised rest, and the ratio carries that difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# exp(20) is 5e8: beyond it a ratio says only "unrelated". Clamped there (gradient 0), one absurd
# token cannot turn the whole batch's gradient into infinity.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStats:
    """Over the N trained tokens of one micro-batch. Detached 0-d tensors, on the model's device."""

    num_tokens: int
    loss: Tensor  # sum of per-token losses, without the normalisation
    num_clipped: Tensor  # tokens whose gradient the clip took
    ratio: Tensor  # sum of the clipped objective's ratio, before clipping
    entropy: Tensor  # sum, nats
    kl_rollout: Tensor  # sum of k3 estimates of KL(sampler || learner), nats
    delta: Tensor  # sum of |trainer_logprobs - rollout_logprobs|
    max_delta: Tensor  # its maximum
    kl_ref: Tensor  # sum of k3 estimates of KL(learner || reference), nats; 0 without a reference


def policy_loss(
    *,
    trainer_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    entropies: Tensor,
    num_batch_tokens: int,
    eps_clip: float,
    eps_clip_higher: float | None = None,
    proximal_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_ctl: float = 0.0,
) -> tuple[Tensor, TokenStats]:
    """Loss of one micro-batch (0-d, with gradient), and its statistics.

    All tensors are float32 [N], one entry per trained token; gradient flows through
    `trainer_logprobs` only. `num_batch_tokens`: trained tokens of the whole optimizer batch.
    """
    advantages = advantages.detach()
    behaviour = rollout_logprobs if proximal_logprobs is None else proximal_logprobs
    ratio = _ratio(trainer_logprobs, behaviour)
    upper = eps_clip if eps_clip_higher is None else eps_clip_higher
    unclipped = ratio * advantages
    clipped = ratio.clamp(1.0 - eps_clip, 1.0 + upper) * advantages
    losses = -torch.minimum(unclipped, clipped)
    if proximal_logprobs is not None:
        losses = losses * _ratio(proximal_logprobs, rollout_logprobs).detach()
    kl_ref = torch.zeros_like(losses)
    if ref_logprobs is not None:
        kl_ref = k3(_clamped(ref_logprobs.detach() - trainer_logprobs))
        losses = losses + kl_ctl * kl_ref
    with torch.no_grad():
        log_ratio = trainer_logprobs - rollout_logprobs
        stats = TokenStats(
            num_tokens=losses.numel(),
            loss=losses.sum(),
            num_clipped=(clipped < unclipped).sum(),
            ratio=ratio.sum(),
            entropy=entropies.sum(),
            kl_rollout=k3(_clamped(log_ratio)).sum(),
            delta=log_ratio.abs().sum(),
            max_delta=log_ratio.abs().max(),
            kl_ref=kl_ref.sum(),
        )
    return losses.sum() / num_batch_tokens, stats


def k3(log_ratio: Tensor) -> Tensor:
    """Per-token estimate of KL(p || q) at tokens drawn from p, `log_ratio` = log q - log p.

    Never negative, unbiased, of low variance (Schulman, "Approximating KL Divergence", 2020).
    """
    return torch.expm1(log_ratio) - log_ratio


def _clamped(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _ratio(logprobs: Tensor, behaviour: Tensor) -> Tensor:
    return _clamped(logprobs - behaviour.detach()).exp()


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanStats:
    """`TokenStats` of several micro-batches, per token."""

    num_tokens: int
    loss: float
    clip_fraction: float
    ratio: float
    entropy: float
    kl_rollout: float
    mean_delta: float
    max_delta: float
    kl_ref: float


def mean_stats(parts: Sequence[TokenStats]) -> MeanStats:
    """Means over all tokens of `parts` (at least one). Waits for the device once."""
    sums = torch.stack(
        [
            torch.stack(
                [p.loss, p.num_clipped.float(), p.ratio, p.entropy, p.kl_rollout, p.delta, p.kl_ref]
            )
            for p in parts
        ]
    )
    num_tokens = sum(p.num_tokens for p in parts)
    max_delta = torch.stack([p.max_delta for p in parts]).max()
    values = torch.cat([sums.double().sum(0) / num_tokens, max_delta.double()[None]]).tolist()
    loss, clip_fraction, ratio, entropy, kl_rollout, mean_delta, kl_ref, largest = values
    return MeanStats(
        num_tokens=num_tokens,
        loss=loss,
        clip_fraction=clip_fraction,
        ratio=ratio,
        entropy=entropy,
        kl_rollout=kl_rollout,
        mean_delta=mean_delta,
        max_delta=largest,
        kl_ref=kl_ref,
    )
