"""The policy loss, by hand and against autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from areal_sub.config.schema import ActorConfig
from areal_sub.learner.loss import TokenStats, mean_stats, policy_loss, token_weights, total
from areal_sub.learner.ratios import k1, k2, k3


def run(
    trainer: list[float],
    rollout: list[float],
    advantages: list[float],
    *,
    sequences: list[int] | None = None,
    num_batch_tokens: int | None = None,
    proximal: list[float] | None = None,
    ref: list[float] | None = None,
    **options: Any,
):  # type: ignore[no-untyped-def]
    """Loss, gradient and statistics; every token is of one sequence unless `sequences` says it."""
    logprobs = torch.tensor(trainer, requires_grad=True)
    rows = torch.tensor(sequences or [0] * len(trainer))
    actor = ActorConfig.model_validate(
        {"path": "x", "use_decoupled_loss": proximal is not None} | options
    )
    num_sequences = int(rows.max()) + 1
    loss, stats = policy_loss(
        actor,
        trainer_logprobs=logprobs,
        rollout_logprobs=torch.tensor(rollout),
        advantages=torch.tensor(advantages),
        entropies=torch.arange(len(trainer), dtype=torch.float32),
        sequences=rows,
        num_sequences=num_sequences,
        weights=token_weights(
            actor,
            rows,
            num_sequences,
            num_batch_tokens=num_batch_tokens or len(trainer),
            num_batch_sequences=num_sequences,
        ),
        proximal_logprobs=None if proximal is None else torch.tensor(proximal),
        ref_logprobs=None if ref is None else torch.tensor(ref),
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
    mean = mean_stats(stats)
    assert (mean.ratio, mean.clip_fraction, mean.kl_rollout, mean.max_delta) == (1, 0, 0, 0)
    assert mean.entropy == 0.5


def test_clip_takes_the_gradient_only_where_the_ratio_went_too_far_the_right_way() -> None:
    rollout = [-1.0] * 4
    trainer = [-1.0 + math.log(r) for r in (1.5, 1.5, 0.5, 0.5)]
    loss, grad, stats = run(trainer, rollout, [1.0, -1.0, 1.0, -1.0])
    # min(1.5, 1.2) = 1.2; min(-1.5, -1.2) = -1.5; min(.5, .8) = .5; min(-.5, -.8) = -.8
    assert loss == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8) / 4)
    close(grad, [0.0, 1.5 / 4, -0.5 / 4, 0.0])
    assert mean_stats(stats).clip_fraction == 0.5


def test_clip_higher() -> None:
    trainer = [math.log(1.25), math.log(1.35)]
    loss, grad, _ = run(trainer, [0.0, 0.0], [1.0, 1.0], eps_clip=0.2, eps_clip_higher=0.28)
    assert loss == pytest.approx(-(1.25 + 1.28) / 2)
    close(grad, [-1.25 / 2, 0.0])


def test_decoupled_clips_around_the_proximal_policy_and_weighs_by_the_behaviour() -> None:
    rollout, proximal = [-2.0, -2.0], [-1.5, -1.0]
    trainer = [-1.5 + math.log(1.1), -1.0 + math.log(1.5)]
    loss, grad, stats = run(trainer, rollout, [1.0, 1.0], proximal=proximal)
    weights = [math.exp(0.5), math.exp(1.0)]
    assert loss == pytest.approx(-(weights[0] * 1.1 + weights[1] * 1.2) / 2, rel=1e-5)
    close(grad, [-weights[0] * 1.1 / 2, 0.0])
    mean = mean_stats(stats)
    assert mean.ratio == pytest.approx((1.1 + 1.5) / 2)
    # The distance to the sampler is still measured from the learner.
    assert mean.max_delta == pytest.approx(1.0 + math.log(1.5), rel=1e-5)


def test_decoupled_equals_plain_where_the_proximal_policy_is_the_sampler() -> None:
    trainer, rollout = [-1.3, -0.4], [-1.0, -0.9]
    plain = run(trainer, rollout, [1.0, -2.0])
    decoupled = run(trainer, rollout, [1.0, -2.0], proximal=rollout)
    assert plain[0] == decoupled[0]
    assert torch.equal(plain[1], decoupled[1])


def test_kl_to_the_reference() -> None:
    loss, grad, stats = run([-1.0], [-1.0], [0.0], ref=[-1.5], kl_ctl=0.1)
    expected = math.exp(-0.5) + 0.5 - 1
    assert loss == pytest.approx(0.1 * expected)
    close(grad, [0.1 * (1 - math.exp(-0.5))])
    assert mean_stats(stats).kl_ref == pytest.approx(expected)


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
    assert math.isfinite(mean_stats(stats).kl_rollout)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"importance_sampling_level": "sequence"},
        {"c_clip": 1.5},
        {"kl_estimator": "k2"},
        {"rejection_sampling": {"upper": 1.5, "lower": 0.5}},
    ],
    ids=str,
)
def test_gradient_agrees_with_finite_differences(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(12, dtype=torch.float64, generator=generator)  # noqa: E731
    rollout, proximal, ref, advantages = draw(), draw() * 0.1, draw(), draw()
    rows = torch.arange(12) // 4
    actor = ActorConfig.model_validate(
        {"path": "x", "use_decoupled_loss": True, "kl_ctl": 0.3} | options
    )

    def loss(logprobs: Tensor) -> Tensor:
        return policy_loss(
            actor,
            trainer_logprobs=logprobs,
            rollout_logprobs=rollout,
            advantages=advantages,
            entropies=torch.zeros(12),
            sequences=rows,
            num_sequences=3,
            weights=torch.full((12,), 1 / 12),
            proximal_logprobs=proximal,
            ref_logprobs=ref,
        )[0]

    at = draw() * 0.3
    if options.get("importance_sampling_level") != "sequence":
        assert torch.autograd.gradcheck(loss, (at.requires_grad_(),))
        return
    # The token form of GSPO has GSPO's gradient, where a sequence's advantages are all the same and
    # its tokens weigh the same; its value is the same everywhere.
    advantages = advantages[::4].repeat_interleave(4)

    def gspo(logprobs: Tensor) -> Tensor:
        ratios = (logprobs - proximal).reshape(3, 4).mean(1).exp()
        a = advantages[::4]
        inner = -torch.minimum(ratios * a, ratios.clamp(0.8, 1.2) * a).repeat_interleave(4)
        log_ref = ref - logprobs
        kl = torch.expm1(log_ref) - log_ref
        return (inner * (proximal - rollout).exp() + 0.3 * kl).sum() / 12

    # Behaviour weights differ by token: GSPO's own gradient spreads them over the sequence.
    rollout = proximal
    ours = torch.autograd.grad(loss(at.requires_grad_()), at)[0]
    theirs = torch.autograd.grad(gspo(at), at)[0]
    assert loss(at).item() == pytest.approx(gspo(at).item())
    torch.testing.assert_close(ours, theirs)


def test_stats_of_parts_are_means_over_all_their_tokens() -> None:
    parts: list[TokenStats] = [
        run([-1.0], [-1.5], [1.0])[2],
        run([-1.0, -2.0, -3.0], [-1.0, -2.25, -3.0], [1.0, 1.0, 1.0])[2],
    ]
    mean = mean_stats(total(parts))
    assert mean.num_tokens == 4
    assert mean.mean_delta == pytest.approx(0.75 / 4)
    assert mean.max_delta == 0.5
    assert mean.entropy == pytest.approx((0 + 0 + 1 + 2) / 4)


# Every value below is worked out by hand.


def test_dual_clip_bounds_what_a_bad_token_may_cost() -> None:
    # A < 0. Ratios 4 and 2, ceiling 3: the losses are min(4, 3) = 3 without gradient, and 2 with.
    trainer = [math.log(4.0), math.log(2.0)]
    loss, grad, stats = run(trainer, [0.0, 0.0], [-1.0, -1.0], c_clip=3.0)
    assert loss == pytest.approx((3 + 2) / 2)
    close(grad, [0.0, 2 / 2])
    assert mean_stats(stats).clip_fraction == 0.5
    # Where the advantage is positive it does nothing: min(4, 1.2) = 1.2.
    assert run([math.log(4.0)], [0.0], [1.0], c_clip=3.0)[0] == pytest.approx(-1.2)


def test_cispo_clips_the_weight_and_keeps_every_gradient() -> None:
    # Ratios 2 and 0.5 become 1.2 and 0.8; the gradient is -weight * A, also where PPO has none.
    trainer = [-1.0 + math.log(2.0), -1.0 + math.log(0.5)]
    loss, grad, stats = run(trainer, [-1.0, -1.0], [1.0, -2.0], objective="cispo")
    close(grad, [-1.2 * 1 / 2, 0.8 * 2 / 2])
    assert loss == pytest.approx((-1.2 * trainer[0] + 0.8 * 2 * trainer[1]) / 2, rel=1e-5)
    assert mean_stats(stats).clip_fraction == 1.0


def test_gspo_clips_whole_sequences_by_their_geometric_mean() -> None:
    # Sequence 0: ratios 4 and 1/4, geometric mean 1: nothing is clipped, though both tokens alone
    # would be. Sequence 1: ratios 2 and 8, mean 4 > 1.2: all of it is.
    trainer = [math.log(r) for r in (4.0, 0.25, 2.0, 8.0)]
    options = {"importance_sampling_level": "sequence", "loss_agg_mode": "sequence_mean"}
    loss, grad, stats = run(trainer, [0.0] * 4, [1.0] * 4, sequences=[0, 0, 1, 1], **options)
    assert loss == pytest.approx(-(1 + 1.2) / 2)
    # s * A / (sequences * tokens) = 1 / 4 each
    close(grad, [-0.25, -0.25, 0.0, 0.0])
    mean = mean_stats(stats)
    assert (mean.clip_fraction, mean.ratio) == pytest.approx((0.5, 2.5))


def test_normalisations() -> None:
    # On policy, so each token's loss is -A. Sequences of 1 and 3 tokens.
    trainer, advantages, rows = [-1.0] * 4, [1.0, 2.0, 2.0, 2.0], [0, 1, 1, 1]

    def value(**options: Any) -> float:
        return float(run(trainer, trainer, advantages, sequences=rows, **options)[0])

    assert value() == pytest.approx(-7 / 4)
    assert value(loss_agg_mode="sequence_mean") == pytest.approx(-(1 + 2) / 2)
    assert value(loss_agg_mode="constant", loss_agg_constant=10) == pytest.approx(-7 / 20)


@pytest.mark.parametrize(
    ("rule", "weights"),
    [
        (None, [0.1, 1.0, 2.0, 8.0]),
        # Truncated importance sampling: token clamp.
        ({"action": "clamp", "upper": 2.0}, [0.1, 1.0, 2.0, 2.0]),
        ({"action": "mask", "upper": 2.0}, [0.1, 1.0, 2.0, 0.0]),
        # IcePop: both bounds, on tokens.
        ({"action": "mask", "upper": 5.0, "lower": 0.5}, [0.0, 1.0, 2.0, 0.0]),
        # Sequences: 0.1 * 1 = 0.1 and 2 * 8 = 16; geometric sqrt(0.1) and 4; largest 1 and 8.
        ({"level": "sequence", "agg": "sum", "upper": 5.0}, [0.1, 0.1, 0.0, 0.0]),
        ({"level": "sequence", "agg": "mean", "upper": 5.0}, [0.1**0.5, 0.1**0.5, 4.0, 4.0]),
        (
            {"level": "sequence", "agg": "mean", "upper": 3.0, "lower": 0.5, "action": "clamp"},
            [0.5, 0.5, 3.0, 3.0],
        ),
        ({"level": "sequence", "agg": "max", "upper": 5.0}, [0.1, 1.0, 0.0, 0.0]),
        # k2 = (log w)^2 / 2: 2.65, 0, 0.24, 2.16. k3 = w - 1 - log w: 1.40, 0, 0.31, 4.92.
        ({"metric": "kl_k2", "upper": 2.5}, [0.0, 1.0, 2.0, 8.0]),
        ({"metric": "kl_k3", "upper": 2.0}, [0.1, 1.0, 2.0, 0.0]),
        # k1 of KL(sampler || proximal) = -log w: 2.30, 0, -0.69, -2.08.
        ({"metric": "kl_k1", "upper": 1.0, "lower": -2.0}, [0.0, 1.0, 2.0, 0.0]),
    ],
    ids=str,
)
def test_importance_corrections(rule: Any, weights: list[float]) -> None:
    proximal = [math.log(w) - 3.0 for w in (0.1, 1.0, 2.0, 8.0)]
    loss, grad, stats = run(
        proximal,  # ratio 1
        [-3.0] * 4,
        [1.0] * 4,
        sequences=[0, 0, 1, 1],
        proximal=proximal,
        rejection_sampling=rule,
    )
    assert loss == pytest.approx(-sum(weights) / 4, rel=1e-5)
    close(grad, [-w / 4 for w in weights])
    mean = mean_stats(stats)
    assert mean.weight == pytest.approx(sum(weights) / 4, rel=1e-5)
    assert mean.max_weight == pytest.approx(max(weights), rel=1e-5)
    assert mean.masked_share == weights.count(0.0) / 4
    squares = sum(w * w for w in weights)
    assert mean.effective_share == pytest.approx(sum(weights) ** 2 / (4 * squares), rel=1e-5)


def test_a_rejected_token_feels_no_kl_penalty_either() -> None:
    rule = {"upper": 2.0}
    options = {"proximal": [0.0, 0.0], "kl_ctl": 1.0, "rejection_sampling": rule}
    _, grad, _ = run([0.0, 0.0], [-3.0, 0.0], [0.0, 0.0], ref=[-1.0, -1.0], **options)
    close(grad, [0.0, (1 - math.exp(-1.0)) / 2])


def test_interpolated_proximal_lies_between_sampler_and_learner_by_age() -> None:
    from areal_sub.learner.ratios import interpolated_proximal

    # The step makes version 6 out of 5. Tokens of version 5: the sampler is the proximal policy;
    # of 4: half way; of 2: three quarters.
    got = interpolated_proximal(
        torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-2.0, -2.0, -2.0]),
        torch.tensor([5, 4, 2]), 5,
    )  # fmt: skip
    close(got, [-2.0, -1.5, -1.25])


def test_kl_estimators() -> None:
    # log(π_ref / π) = -0.5
    log_ratio = torch.tensor(-0.5)
    assert k1(log_ratio).item() == 0.5
    assert k2(log_ratio).item() == 0.125
    assert k3(log_ratio).item() == pytest.approx(math.exp(-0.5) - 1 + 0.5)
    # k1 is reported as it is, and has the gradient of k2, which is log(π / π_ref) = 0.5.
    for estimator, value in (("k1", 0.5), ("k2", 0.125)):
        loss, grad, stats = run(
            [-1.0], [-1.0], [0.0], ref=[-1.5], kl_ctl=1.0, kl_estimator=estimator
        )
        assert loss == pytest.approx(value) and mean_stats(stats).kl_ref == pytest.approx(value)
        close(grad, [0.5])
