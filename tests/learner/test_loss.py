"""The policy loss, by hand and against autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from areal_sub.learner.loss import TokenStats, k3, mean_stats, policy_loss


def run(trainer: list[float], rollout: list[float], advantages: list[float], **options: Any):  # type: ignore[no-untyped-def]
    logprobs = torch.tensor(trainer, requires_grad=True)
    options.setdefault("num_batch_tokens", len(trainer))
    options.setdefault("eps_clip", 0.2)
    for name in ("proximal_logprobs", "ref_logprobs"):
        if name in options:
            options[name] = torch.tensor(options[name])
    loss, stats = policy_loss(
        trainer_logprobs=logprobs,
        rollout_logprobs=torch.tensor(rollout),
        advantages=torch.tensor(advantages),
        entropies=torch.arange(len(trainer), dtype=torch.float32),
        **options,
    )
    loss.backward()
    assert logprobs.grad is not None
    return loss.item(), logprobs.grad, stats


def close(got: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(got, torch.tensor(expected))


def test_on_policy_gradient_is_reinforce() -> None:
    loss, grad, stats = run([-1.0, -2.0], [-1.0, -2.0], [1.0, -0.5])
    assert loss == pytest.approx(-0.25)
    close(grad, [-0.5, 0.25])
    mean = mean_stats([stats])
    assert (mean.ratio, mean.clip_fraction, mean.kl_rollout, mean.max_delta) == (1, 0, 0, 0)
    assert mean.entropy == 0.5


def test_clip_takes_the_gradient_only_where_the_ratio_went_too_far_the_right_way() -> None:
    rollout = [-1.0] * 4
    trainer = [-1.0 + math.log(r) for r in (1.5, 1.5, 0.5, 0.5)]
    loss, grad, stats = run(trainer, rollout, [1.0, -1.0, 1.0, -1.0])
    # min(1.5, 1.2) = 1.2; min(-1.5, -1.2) = -1.5; min(.5, .8) = .5; min(-.5, -.8) = -.8
    assert loss == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8) / 4)
    close(grad, [0.0, 1.5 / 4, -0.5 / 4, 0.0])
    assert mean_stats([stats]).clip_fraction == 0.5


def test_clip_higher() -> None:
    trainer = [math.log(1.25), math.log(1.35)]
    loss, grad, _ = run(trainer, [0.0, 0.0], [1.0, 1.0], eps_clip=0.2, eps_clip_higher=0.28)
    assert loss == pytest.approx(-(1.25 + 1.28) / 2)
    close(grad, [-1.25 / 2, 0.0])


def test_decoupled_clips_around_the_proximal_policy_and_weighs_by_the_behaviour() -> None:
    rollout, proximal = [-2.0, -2.0], [-1.5, -1.0]
    trainer = [-1.5 + math.log(1.1), -1.0 + math.log(1.5)]
    loss, grad, stats = run(trainer, rollout, [1.0, 1.0], proximal_logprobs=proximal)
    weights = [math.exp(0.5), math.exp(1.0)]
    assert loss == pytest.approx(-(weights[0] * 1.1 + weights[1] * 1.2) / 2, rel=1e-5)
    close(grad, [-weights[0] * 1.1 / 2, 0.0])
    mean = mean_stats([stats])
    assert mean.ratio == pytest.approx((1.1 + 1.5) / 2)
    # The distance to the sampler is still measured from the learner.
    assert mean.max_delta == pytest.approx(1.0 + math.log(1.5), rel=1e-5)


def test_decoupled_equals_plain_where_the_proximal_policy_is_the_sampler() -> None:
    trainer, rollout = [-1.3, -0.4], [-1.0, -0.9]
    plain = run(trainer, rollout, [1.0, -2.0])
    decoupled = run(trainer, rollout, [1.0, -2.0], proximal_logprobs=rollout)
    assert plain[0] == decoupled[0]
    assert torch.equal(plain[1], decoupled[1])


def test_kl_to_the_reference() -> None:
    loss, grad, stats = run([-1.0], [-1.0], [0.0], ref_logprobs=[-1.5], kl_ctl=0.1)
    expected = math.exp(-0.5) + 0.5 - 1
    assert loss == pytest.approx(0.1 * expected)
    close(grad, [0.1 * (1 - math.exp(-0.5))])
    assert mean_stats([stats]).kl_ref == pytest.approx(expected)


def test_k3_is_an_unbiased_kl() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.4, 0.4, 0.2])
    log_ratio = (q / p).log()
    assert (p * k3(log_ratio)).sum().item() == pytest.approx((p * (p / q).log()).sum().item())
    assert (k3(log_ratio) >= 0).all()


def test_normalisation_is_by_the_tokens_of_the_whole_batch() -> None:
    trainer, rollout, advantages = [-1.0, -2.0, -0.5], [-1.1, -1.7, -0.5], [1.0, -0.5, 2.0]
    whole, grad, _ = run(trainer, rollout, advantages)
    first, grad_1, _ = run(trainer[:1], rollout[:1], advantages[:1], num_batch_tokens=3)
    rest, grad_2, _ = run(trainer[1:], rollout[1:], advantages[1:], num_batch_tokens=3)
    assert whole == pytest.approx(first + rest)
    torch.testing.assert_close(grad, torch.cat([grad_1, grad_2]))


def test_an_absurd_token_does_not_make_the_gradient_infinite() -> None:
    loss, grad, stats = run([-0.1, -1.0], [-150.0, -1.0], [-1.0, -1.0])
    assert math.isfinite(loss)
    close(grad, [0.0, 0.5])
    assert math.isfinite(mean_stats([stats]).kl_rollout)


def test_gradient_agrees_with_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(12, dtype=torch.float64, generator=generator)  # noqa: E731
    rollout, proximal, ref, advantages = draw(), draw() * 0.1, draw(), draw()

    def loss(logprobs: Tensor) -> Tensor:
        return policy_loss(
            trainer_logprobs=logprobs,
            rollout_logprobs=rollout,
            advantages=advantages,
            entropies=torch.zeros(12),
            num_batch_tokens=12,
            eps_clip=0.2,
            proximal_logprobs=proximal,
            ref_logprobs=ref,
            kl_ctl=0.3,
        )[0]

    assert torch.autograd.gradcheck(loss, (draw().requires_grad_(),))


def test_stats_of_parts_are_means_over_all_their_tokens() -> None:
    parts: list[TokenStats] = [
        run([-1.0], [-1.5], [1.0])[2],
        run([-1.0, -2.0, -3.0], [-1.0, -2.25, -3.0], [1.0, 1.0, 1.0])[2],
    ]
    mean = mean_stats(parts)
    assert mean.num_tokens == 4
    assert mean.mean_delta == pytest.approx(0.75 / 4)
    assert mean.max_delta == 0.5
    assert mean.entropy == pytest.approx((0 + 0 + 1 + 2) / 4)
