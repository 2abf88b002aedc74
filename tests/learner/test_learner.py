"""The optimizer step: against an independent computation, and for what must not change it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from areal_sub.errors import ConfigError
from areal_sub.learner import model as model_module
from areal_sub.learner.learner import Learner
from areal_sub.trajectory.samples import RolloutSamples

Groups = list[list[RolloutSamples]]
UNCLIPPED = {"lr": 1e-3, "gradient_clipping": 1e9}


def parameters(learner: Learner) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in learner._policy.hf.named_parameters()}


def gradient_of_step(learner: Learner, groups: Groups) -> tuple[dict[str, Tensor], Any]:
    """The gradient as the optimizer gets it, at its first step, and the step's statistics."""
    seen: list[dict[str, Tensor]] = []
    named = list(learner._policy.hf.named_parameters())

    def look(*_: object) -> None:
        seen.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    handle = learner.optimizer.register_step_pre_hook(look)
    stats = learner.step(groups)
    handle.remove()
    return seen[0], stats


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_gradient_is_that_of_a_straightforward_computation(
    load_learner: Any, straightforward: Any, groups: Groups
) -> None:
    temperature, eps, upper, kl_ctl = 0.7, 0.1, 0.3, 0.2
    learner = load_learner(
        temperature=temperature,
        eps_clip=eps,
        eps_clip_higher=upper,
        kl_ctl=kl_ctl,
        adv_norm="mean",
        mb_spec={"max_tokens_per_mb": 30},
        optimizer=UNCLIPPED,
    )
    got, stats = gradient_of_step(learner, groups)

    plain = straightforward(temperature)
    total, count, clipped = torch.zeros(()), 0, 0
    for group in groups:
        rewards = [rollout.reward for rollout in group]
        for rollout in group:
            advantage = rollout.reward - sum(rewards) / len(rewards)
            if len(set(rewards)) == 1:
                advantage = 0.0
            for sample in rollout.samples:
                logprobs = plain.logprobs(sample.token_ids.tolist())
                for i in np.flatnonzero(sample.loss_mask).tolist():
                    ratio = (logprobs[i] - float(sample.rollout_logprobs[i])).exp()
                    limited = min(max(ratio.item(), 1 - eps), 1 + upper)
                    if limited * advantage < ratio.item() * advantage:
                        total, clipped = total - limited * advantage, clipped + 1
                    else:
                        total = total - ratio * advantage
                    log_ref = logprobs[i].detach() - logprobs[i]  # the reference is the start
                    total = total + kl_ctl * (log_ref.exp() - log_ref - 1)
                    count += 1
    loss = total / count
    loss.backward()
    named = plain.hf.named_parameters()
    assert_close(got, {n: p.grad for n, p in named if p.grad is not None})
    assert stats.loss == pytest.approx(loss.item(), abs=1e-5)
    assert stats.num_trained_tokens == count
    assert 0 < clipped == round(stats.clip_fraction * count)
    assert stats.num_micro_batches > 1 and stats.num_degenerate_groups == 1
    assert stats.kl_ref == 0.0


@pytest.mark.parametrize(
    "options",
    [
        {"mb_spec": {"max_tokens_per_mb": 1}},
        {"mb_spec": {"max_tokens_per_mb": 45}},
        {"gradient_checkpointing": True},
        {"use_decoupled_loss": True},
    ],
    ids=str,
)
def test_how_a_batch_is_computed_does_not_change_its_gradient(
    load_learner: Any, groups: Groups, options: dict[str, Any]
) -> None:
    # On-policy, with one minibatch, the decoupled objective has the plain one's gradient: see to it
    # that the behaviour weight and ratio multiply to the same, without clipping.
    common = {"optimizer": UNCLIPPED, "eps_clip": 0.999, "eps_clip_higher": 1e9}
    whole, _ = gradient_of_step(load_learner(**common), groups)
    other, _ = gradient_of_step(load_learner(**common, **options), groups)
    assert_close(other, whole)


def test_logits_in_chunks_give_the_same(
    load_learner: Any, groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, whole_stats = gradient_of_step(load_learner(optimizer=UNCLIPPED), groups)
    monkeypatch.setattr(model_module, "MAX_LOGITS", 5 * 32)
    chunks: list[int] = []
    learner = load_learner(optimizer=UNCLIPPED)
    head = learner._policy.hf.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, args: chunks.append(args[0].shape[0]))
    got, stats = gradient_of_step(learner, groups)
    assert_close(got, whole)
    assert max(chunks) == 5  # never more than MAX_LOGITS at once, in no pass
    assert stats.entropy == pytest.approx(whole_stats.entropy)


def test_gradient_checkpointing_recomputes_the_layers(load_learner: Any, groups: Groups) -> None:
    def num_passes(**options: Any) -> int:
        learner = load_learner(**options)
        calls: list[int] = []
        # The MLP lies inside the checkpointed layer: it runs again in the backward pass.
        mlp = learner._policy.hf.model.layers[0].mlp
        mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        learner.step(groups)
        return len(calls)

    assert num_passes() == 1
    assert num_passes(gradient_checkpointing=True) == 2


def test_learner_agrees_with_the_sampler_to_rounding(
    load_learner: Any, straightforward: Any, groups: Groups
) -> None:
    score = straightforward(0.8).logprobs

    def exact(sample: Any) -> Any:
        with torch.no_grad():
            logprobs = score(sample.token_ids.tolist()).numpy()
        masked = np.where(sample.loss_mask, logprobs, 0).astype(np.float32)
        return dataclasses.replace(sample, rollout_logprobs=masked)

    on_policy = [
        [dataclasses.replace(r, samples=tuple(map(exact, r.samples))) for r in group]
        for group in groups
    ]
    stats = load_learner(temperature=0.8).step(on_policy)
    assert stats.logprob_delta_mean < 2e-6 and stats.logprob_delta_max < 2e-5
    assert stats.kl_rollout < 1e-9 and stats.clip_fraction == 0
    assert stats.ratio == pytest.approx(1, abs=1e-5)
    # At another temperature it is another distribution.
    assert load_learner(temperature=1.0).step(on_policy).logprob_delta_mean > 0.05


def test_rewarded_tokens_become_likely(load_learner: Any, make_rollout: Any) -> None:
    """A bandit: one token after the prompt, reward 1 for one that is seldom drawn."""
    learner = load_learner(optimizer={"lr": 1e-2}, ppo_n_minibatches=2)
    prompt, rng = [1, 4, 9], np.random.default_rng(0)

    def distribution() -> Any:
        with torch.no_grad():
            logits = learner._policy.hf(input_ids=torch.tensor([prompt])).logits[0, -1]
        return logits.double().softmax(-1).numpy()

    start = distribution()
    best = int(np.abs(start - 0.05).argmin())
    for _ in range(15):
        p = distribution()
        rollouts = []
        for token in rng.choice(32, size=64, p=p / p.sum()).tolist():
            reward = float(token == best)
            rollouts.append(make_rollout(reward, ([*prompt, token], [3], [np.log(p[token])])))
        stats = learner.step([rollouts])
    assert start[best] < 0.1 and distribution()[best] > 0.9
    assert stats.num_optimizer_steps == 2


def test_minibatches_train_every_token_once_in_an_order_of_the_seed(
    load_learner: Any, groups: Groups
) -> None:
    def run(seed: int) -> tuple[dict[str, Tensor], Any]:
        learner = load_learner(seed=seed, ppo_n_minibatches=3)
        learner.step(groups)
        return parameters(learner), learner.step(groups)

    first, stats = run(1)
    again, _ = run(1)
    other, _ = run(2)
    num_tokens = sum(s.num_trained_tokens for g in groups for r in g for s in r.samples)
    assert stats.num_trained_tokens == num_tokens and stats.num_optimizer_steps == 3
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not all(torch.equal(first[n], other[n]) for n in first)


def test_more_minibatches_than_samples_is_one_each(load_learner: Any, make_rollout: Any) -> None:
    pair = [make_rollout(v, ([1, 5], [1], [-1.0])) for v in (0.0, 1.0)]
    assert load_learner(ppo_n_minibatches=10).step([pair]).num_optimizer_steps == 2


def test_sampler_mismatch_is_measured_before_the_first_update(
    load_learner: Any, groups: Groups
) -> None:
    # Every sample is in the first minibatch of the one and, at this rate, far off in the other.
    calm = load_learner(ppo_n_minibatches=1, optimizer={"lr": 1e-9}).step(groups)
    wild = load_learner(ppo_n_minibatches=4, optimizer={"lr": 1.0}).step(groups)
    assert wild.ratio > 10 * calm.ratio or wild.ratio < 0.5 * calm.ratio
    assert wild.logprob_delta_mean < 2 * calm.logprob_delta_mean


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_left_out_and_counted(
    load_learner: Any, groups: Groups, poison: float
) -> None:
    learner = load_learner()
    before = parameters(learner)
    sample = groups[0][0].samples[0]
    bad = dataclasses.replace(sample, returns=np.where(sample.loss_mask, poison, 0))
    rollout = dataclasses.replace(groups[0][0], samples=(bad,))
    stats = learner.step([[rollout, *groups[0][1:]]])
    assert stats.num_skipped_steps == 1 and not np.isfinite(stats.grad_norm)
    after = parameters(learner)
    assert all(torch.equal(before[n], after[n]) for n in before)
    # The next step is sound again: nothing of the poison stayed in gradients or moments.
    assert learner.step(groups).num_skipped_steps == 0
    assert all(p.isfinite().all() for p in parameters(learner).values())


def test_degenerate_groups_change_nothing(load_learner: Any, groups: Groups) -> None:
    learner = load_learner()
    before = parameters(learner)
    stats = learner.step([groups[2], groups[2]])
    assert (stats.num_groups, stats.num_degenerate_groups, stats.grad_norm) == (2, 2, 0.0)
    after = parameters(learner)
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_without_a_token_to_train_there_is_no_step(load_learner: Any, make_rollout: Any) -> None:
    learner = load_learner()
    for empty in ([], [[make_rollout(1.0)]], [[make_rollout(1.0, ([1, 2], [], []))]]):
        with pytest.raises(ValueError, match="token to train"):
            learner.step(empty)
    assert learner.num_steps == 0


def test_kl_to_the_reference_grows_from_zero(load_learner: Any, groups: Groups) -> None:
    learner = load_learner(kl_ctl=0.01)
    values = [learner.step(groups).kl_ref for _ in range(3)]
    assert values[0] == 0.0 < values[1] < values[2]
    assert load_learner().step(groups).kl_ref == 0.0


def test_weight_decay_spares_vectors(load_learner: Any, groups: Groups) -> None:
    def trained(weight_decay: float) -> dict[str, Tensor]:
        learner = load_learner(optimizer={"lr": 1e-3, "weight_decay": weight_decay})
        learner.step(groups)
        return parameters(learner)

    plain, decayed = trained(0.0), trained(0.5)
    for name, value in plain.items():
        assert torch.equal(value, decayed[name]) == (value.ndim < 2), name


def test_gradients_are_clipped_and_the_learning_rate_is_scheduled(
    load_learner: Any, groups: Groups
) -> None:
    learner = load_learner(
        optimizer={"lr": 0.5, "gradient_clipping": 1e-3, "warmup_steps_proportion": 0.1}
    )
    gradient, stats = gradient_of_step(learner, groups)
    norm = torch.stack([g.norm() for g in gradient.values()]).norm().item()
    assert norm == pytest.approx(1e-3, rel=1e-2) and stats.grad_norm > 1e-3
    assert stats.learning_rate == pytest.approx(0.05)
    assert learner.step(groups).learning_rate == pytest.approx(0.1)


def test_bfloat16_computes_low_and_learns_in_full_precision(
    load_learner: Any, groups: Groups
) -> None:
    exact = load_learner().step(groups)
    learner = load_learner(dtype="bfloat16", optimizer={"lr": 1e-6})
    before = parameters(learner)
    stats = learner.step(groups)
    assert 0 < abs(stats.loss - exact.loss) < 0.05
    after = parameters(learner)
    for name, value in before.items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, after[name]), name
        # An update this small is lost where weights are kept in bfloat16.
    moved = [not torch.equal(before[n].bfloat16(), after[n].bfloat16()) for n in before]
    assert not all(moved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "gconfig.temperature"),
        ({"dtype": "float16"}, "float16: gradients underflow"),
        ({"device": "abacus"}, "actor.device='abacus'"),
        ({"device": "cuda:99"}, "actor.device='cuda:99' cannot be used here"),
    ],
)
def test_settings_that_cannot_work_are_named(
    load_learner: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_learner(**options)


def test_small_models_run_on_one_thread(load_learner: Callable[..., Learner], groups: Any) -> None:
    torch.set_num_threads(2)
    try:
        load_learner().step(groups)
        assert torch.get_num_threads() == 1
        load_learner(num_threads=2).step(groups)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_step_takes_any_sequences(load_learner: Any, groups: Sequence[Any]) -> None:
    stats = load_learner().step(tuple(tuple(group) for group in groups))
    values = dataclasses.asdict(stats)
    assert all(isinstance(v, int | float) for v in values.values())
    assert stats.num_input_tokens <= stats.num_padded_tokens
    assert stats.num_rollouts == 9 and stats.num_groups == 3
