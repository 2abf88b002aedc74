from __future__ import annotations

import pytest
import torch

from areal_sub.engines.embedded.sampling import SamplingRows, distribution, sample

CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def expected(logits: torch.Tensor, temperature: float, top_p: float, top_k: int) -> torch.Tensor:
    """The distribution of one row, by the book."""
    probs = torch.softmax(logits.double() / temperature, dim=-1)
    order = probs.argsort(descending=True)
    kept = order[: top_k or len(order)]
    probs = torch.zeros_like(probs).scatter(0, kept, probs[kept])
    probs = probs / probs.sum()
    mass, keep = 0.0, []
    for token in kept.tolist():
        keep.append(token)
        mass += probs[token].item()
        if mass >= top_p:
            break
    probs = torch.zeros_like(probs).scatter(0, torch.tensor(keep), probs[keep])
    return probs / probs.sum()


ROWS = [
    (1.0, 1.0, 0),
    (0.7, 1.0, 0),
    (1.5, 0.8, 0),
    (1.0, 1.0, 3),
    (2.0, 0.6, 5),
    (1.0, 1e-6, 0),
    (1.0, 1.0, 1),
]


def test_each_row_has_the_distribution_of_its_own_parameters() -> None:
    logits = torch.randn(len(ROWS), 12, generator=generator()) * 2
    got = distribution(logits, SamplingRows.of(ROWS, CPU)).exp().double()
    for row, parameters in enumerate(ROWS):
        torch.testing.assert_close(got[row], expected(logits[row], *parameters), atol=1e-6, rtol=0)


@pytest.mark.parametrize("parameters", ROWS)
def test_samples_follow_the_distribution_and_carry_its_logprobs(
    parameters: tuple[float, float, int],
) -> None:
    num_samples = 20_000
    logits = torch.randn(12, generator=generator(3)) * 1.5
    want = expected(logits, *parameters)
    token_ids, logprobs = sample(
        logits.expand(num_samples, -1),
        SamplingRows.of([parameters] * num_samples, CPU),
        generator(4),
    )
    torch.testing.assert_close(logprobs.double(), want.log()[token_ids], atol=1e-5, rtol=0)
    counts = torch.bincount(token_ids, minlength=12).double()
    possible = want > 0
    assert counts[~possible].sum() == 0
    chi_square = (
        (counts - num_samples * want)[possible] ** 2 / (num_samples * want)[possible]
    ).sum()
    # 99.9 % quantile for 11 degrees of freedom; the seed is fixed, so this never flickers.
    assert chi_square < 31.3


def test_greedy_rows_take_the_likeliest_token_with_the_models_own_logprob() -> None:
    logits = torch.randn(64, 12, generator=generator())
    for others in ([(0.0, 1.0, 0)], [(1.0, 0.9, 2)]):
        rows = SamplingRows.of([(0.0, 0.5, 1)] * 63 + others, CPU)
        token_ids, logprobs = sample(logits, rows, generator())
        assert token_ids[:63].equal(logits.argmax(-1)[:63])
        plain = torch.log_softmax(logits, -1).gather(1, token_ids[:, None])[:, 0]
        torch.testing.assert_close(logprobs[:63], plain[:63])


def test_the_seed_decides() -> None:
    logits = torch.randn(64, 50, generator=generator())
    rows = SamplingRows.of([(1.0, 1.0, 0)] * 64, CPU)
    first, again, other = (sample(logits, rows, generator(s))[0] for s in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)


def test_logits_that_are_not_finite_show_in_that_rows_logprob_only() -> None:
    logits = torch.zeros(3, 12)
    logits[1, 4] = torch.nan
    for top_p in (1.0, 0.5):
        _, logprobs = sample(logits, SamplingRows.of([(1.0, top_p, 0)] * 3, CPU), generator())
        assert logprobs.isfinite().tolist() == [True, False, True]


def test_half_precision_logits_are_sampled_in_float32() -> None:
    logits = torch.randn(4, 12, generator=generator()).bfloat16()
    _, logprobs = sample(logits, SamplingRows.of([(0.9, 0.9, 0)] * 4, CPU), generator())
    assert logprobs.dtype == torch.float32
