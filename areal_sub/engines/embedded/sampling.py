"""From logits to tokens and their logprobs, vectorised over rows with parameters of their own.

Pure tensor functions; the random state is the generator that is passed in. Called by the decode
thread once per step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Sampling parameters of a batch. A field is None where no row needs it, and costs nothing."""

    temperature: Tensor | None  # float32 [rows, 1]; 1 for greedy rows
    sampled: Tensor | None  # bool [rows, 1]: the rows that are not greedy
    has_greedy: bool
    truncated: Tensor | None  # int64 [num_truncated]: the rows with top_k or top_p
    top_k: Tensor | None  # int64 [num_truncated, 1]
    top_p: Tensor | None  # float32 [num_truncated, 1]

    @classmethod
    def of(cls, rows: Sequence[tuple[float, float, int]], device: torch.device) -> SamplingRows:
        """`rows`: (temperature, top_p, top_k) each; temperature 0 is greedy, top_k 0 is off."""
        greedy = [temperature == 0 for temperature, _, _ in rows]
        scales = [temperature or 1.0 for temperature, _, _ in rows]
        truncated = [
            i
            for i, (_, top_p, top_k) in enumerate(rows)
            if not greedy[i] and (top_p < 1 or top_k > 0)
        ]

        def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)

        everything = torch.iinfo(torch.int64).max
        return cls(
            temperature=None if set(scales) == {1.0} else column(scales, torch.float32),
            sampled=None if all(greedy) else column([not g for g in greedy], torch.bool),
            has_greedy=any(greedy),
            truncated=torch.tensor(truncated, device=device) if truncated else None,
            top_k=column([rows[i][2] or everything for i in truncated], torch.int64)
            if truncated
            else None,
            top_p=column([rows[i][1] for i in truncated], torch.float32) if truncated else None,
        )


@dataclass(frozen=True, slots=True)
class Allowed:
    """What some rows may sample, where a grammar says so. Each allows one token at least."""

    rows: Tensor  # int64 [num_constrained]
    tokens: Tensor  # bool [num_constrained, vocab]

    @classmethod
    def of(cls, masks: Mapping[int, NDArray[np.bool_]], device: torch.device) -> Allowed:
        """`masks`: row → bool [vocab]."""
        tokens = torch.from_numpy(np.stack(list(masks.values())))
        return cls(torch.tensor(list(masks), device=device), tokens.to(device))


def sample(
    logits: Tensor,
    rows: SamplingRows,
    generator: torch.Generator,
    allowed: Allowed | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample one token per row.

    Args:
        logits: [rows, vocab], any float dtype.
        allowed: None where no row is constrained. What it forbids is taken out before temperature,
            top-k and top-p, so that these choose among what may come.
    Returns:
        token ids, int64 [rows], and their logprobs, float32 [rows]: of the distribution that was
        sampled from, so after temperature and renormalised over what top-k and then top-p leave.
        A greedy row (temperature 0) takes the most likely token; its logprob is the model's own,
        at temperature 1 and untruncated. A row whose logits are not finite gets a logprob that is
        not finite. A constrained row's logprob is the model's own: after temperature, over the
        whole vocabulary. It says how likely the token was without the constraint, which is what the
        learner computes; of the masked distribution, a forced token would have 0 whatever the model
        thinks of it, and every ratio would carry the difference.

    Draws by inverting the cumulative distribution, in float64: one random number per row, however
    large the vocabulary, and no token of probability 0 is ever drawn.
    """
    logits = logits.float()
    if allowed is None:
        logprobs = distribution(logits, rows)
    else:
        own = logits[allowed.rows]
        masked = own.masked_fill(~allowed.tokens, -torch.inf)
        logprobs = distribution(logits.index_copy(0, allowed.rows, masked), rows)
    if rows.sampled is None:
        token_ids = logprobs.argmax(dim=-1, keepdim=True)
    else:
        cumulative = logprobs.exp().double().cumsum(dim=-1)
        shape, device = (len(logprobs), 1), logprobs.device
        drawn = torch.rand(shape, dtype=torch.float64, device=device, generator=generator)
        token_ids = torch.searchsorted(cumulative, drawn * cumulative[:, -1:], right=True)
        # Beyond the last token is only where the row is not finite.
        token_ids = token_ids.clamp_max(logprobs.shape[-1] - 1)
        if rows.has_greedy:
            likeliest = logprobs.argmax(dim=-1, keepdim=True)
            token_ids = torch.where(rows.sampled, token_ids, likeliest)
    drawn_logprobs = logprobs.gather(1, token_ids)
    if allowed is not None:
        if rows.temperature is not None:
            own = own / rows.temperature[allowed.rows]
        own = torch.log_softmax(own, dim=-1).gather(1, token_ids[allowed.rows])
        drawn_logprobs = drawn_logprobs.index_copy(0, allowed.rows, own)
    return token_ids.squeeze(1), drawn_logprobs.squeeze(1)


def distribution(logits: Tensor, rows: SamplingRows) -> Tensor:
    """The log-probabilities that rows are sampled from, float32 [rows, vocab]."""
    logits = logits.float()
    if rows.temperature is not None:
        logits = logits / rows.temperature
    logprobs = torch.log_softmax(logits, dim=-1)
    if rows.truncated is None:
        return logprobs
    assert rows.top_k is not None and rows.top_p is not None
    return logprobs.index_copy(
        0, rows.truncated, _truncate(logprobs[rows.truncated], rows.top_k, rows.top_p)
    )


def _truncate(logprobs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Keep the `top_k` most likely tokens, of these the fewest whose probability reaches `top_p`,
    and renormalise. The most likely token always stays; ties are cut by token order."""
    ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(logprobs.shape[-1], device=logprobs.device)
    kept = torch.log_softmax(ordered.masked_fill(rank >= top_k, -torch.inf), dim=-1)
    probability = kept.exp()
    before = probability.cumsum(dim=-1) - probability
    # The first token is kept whatever rounding says of its "before".
    kept = kept.masked_fill((before >= top_p) & (rank > 0), -torch.inf)
    kept = torch.log_softmax(kept, dim=-1)
    return torch.empty_like(logprobs).scatter_(1, order, kept)
