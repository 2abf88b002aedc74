"""How far two policies are apart at the trained tokens, and what is done about it. Pure functions
over tensors; called by `loss`.

N trained tokens of one micro-batch lie in S sequences (training samples), each of which is whole:
`sequences` (int64 [N], values 0..S-1) says in which. Logprobs are float32 [N].

    k1, k2, k3               estimators of the KL divergence (Schulman, "Approximating KL
                             Divergence", 2020)
    per_sequence             sum, mean or maximum over each sequence
    interpolated_proximal    the proximal policy without a forward pass (A-3PO, arXiv:2512.06547;
                             AReaL's `prox_logp_method: loglinear`)
    behaviour_weights        the importance weight proximal / sampler, truncated or masked:
                             token clamp is TIS ("Your Efficient RL Framework Secretly Brings You
                             Off-Policy RL Training", Yao et al., 2025), token mask with both bounds
                             is IcePop (Ling Team, arXiv:2510.18855), sequence mask with `sum` or
                             `mean` (geometric) is MIS ("When Speed Kills Stability", Liu et al.,
                             2025)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from areal_sub.config.schema import RejectionSamplingConfig

# exp(20) is 5e8: beyond it a ratio says only "unrelated". Clamped there (gradient 0), one absurd
# token cannot turn the whole batch's gradient into infinity.
MAX_LOG_RATIO = 20.0


def clamped(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


# Estimates of KL(p || q) at tokens drawn from p, of `log_ratio` = log q - log p.


def k1(log_ratio: Tensor) -> Tensor:
    """Unbiased, of high variance, negative half of the time."""
    return -log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """Biased, of low variance; its gradient is an unbiased estimate of the divergence's."""
    return 0.5 * log_ratio.square()


def k3(log_ratio: Tensor) -> Tensor:
    """Unbiased, of low variance, never negative."""
    return torch.expm1(log_ratio) - log_ratio


def kl_penalty(
    trainer_logprobs: Tensor, ref_logprobs: Tensor, estimator: Literal["k1", "k2", "k3"]
) -> Tensor:
    """Per-token estimate of KL(learner || reference), [N], to be added to the loss.

    The gradient of k1 is the score, whose mean is 0: as a loss it would hold nothing. So `k1` has
    its own value and the gradient of k2, which is what k1 as a part of the reward gives.
    """
    log_ratio = clamped(ref_logprobs.detach() - trainer_logprobs)
    match estimator:
        case "k1":
            squares = k2(log_ratio)
            return k1(log_ratio).detach() + squares - squares.detach()
        case "k2":
            return k2(log_ratio)
        case "k3":
            return k3(log_ratio)


def per_sequence(
    values: Tensor, sequences: Tensor, num_sequences: int, agg: Literal["sum", "mean", "max"]
) -> Tensor:
    """`values` [N] → [S], over each sequence's tokens (at least one)."""
    if agg == "max":
        lowest = values.new_full((num_sequences,), -torch.inf)
        return lowest.scatter_reduce(0, sequences, values, "amax")
    sums = values.new_zeros(num_sequences).index_add(0, sequences, values)
    if agg == "sum":
        return sums
    return sums / lengths(sequences, num_sequences).to(sums.dtype)


def lengths(sequences: Tensor, num_sequences: int) -> Tensor:
    """Trained tokens of each sequence, int64 [S]."""
    return torch.bincount(sequences, minlength=num_sequences)


def interpolated_proximal(
    trainer_logprobs: Tensor, rollout_logprobs: Tensor, versions: Tensor, version: int
) -> Tensor:
    """Logprobs of the policy `version`, from which the step began, on the line between the sampler
    (`versions` [N]) and the policy in the making, which will be `version` + 1. Without gradient.

    A token that `version` itself sampled gets the sampler's logprob: alpha is 0.
    """
    age = (version - versions).clamp(min=0).to(trainer_logprobs.dtype)
    alpha = age / (age + 1)
    return rollout_logprobs + alpha * (trainer_logprobs.detach() - rollout_logprobs)


def behaviour_weights(
    proximal_logprobs: Tensor,
    rollout_logprobs: Tensor,
    sequences: Tensor,
    num_sequences: int,
    rule: RejectionSamplingConfig | None,
) -> tuple[Tensor, Tensor]:
    """`proximal / rollout` per token after `rule`, and where a token is kept (bool); both [N].

    The weight of a rejected token is 0. With `level: sequence` and `metric: ratio` the weight of
    each token is its sequence's ratio: the product of its tokens' (`sum`), or its geometric mean
    (`mean`); `max` and the KL metrics only decide, and weights stay those of tokens.
    """
    log_ratio = clamped(proximal_logprobs - rollout_logprobs).detach()
    weights = log_ratio.exp()
    kept = torch.ones_like(weights, dtype=torch.bool)
    if rule is None:
        return weights, kept
    match rule.metric:
        case "ratio":
            measure = log_ratio
        case "kl_k1":  # of KL(sampler || proximal), as the tokens are the sampler's
            measure = k1(log_ratio)
        case "kl_k2":
            measure = k2(log_ratio)
        case "kl_k3":
            measure = k3(log_ratio)
    if rule.level == "sequence":
        measure = per_sequence(measure, sequences, num_sequences, rule.agg)[sequences]
    if rule.metric == "ratio":
        measure = clamped(measure).exp()
        if rule.level == "sequence" and rule.agg != "max":
            weights = measure
    if rule.action == "clamp":
        return weights.clamp(rule.lower, rule.upper), kept
    kept = measure <= rule.upper
    if rule.lower is not None:
        kept &= measure >= rule.lower
    return weights * kept, kept
