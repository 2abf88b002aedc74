"""The exactness certificate: is what is trained what the engine read and sampled, token by token?

The engine sends with each token a CRC-32 over the prompt it read and all that it sampled so far
(`GenerateChunk.digests`). That number travels past rendering, capture, journal, stream, tree and
sample building on its own. Here the same CRC is taken over the finished training sample. A span of
trained tokens whose CRC is not among the engine's is masked and counted, never trained.

The certificate also holds what was not due to be trained, by cause, and why the trees forked. Its
counters are over the rollouts of training steps, and add up to all tokens sampled for them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from areal_sub.records import Fork, Masked, extend_digest
from areal_sub.trajectory.causes import causes
from areal_sub.trajectory.samples import RolloutSamples, TrainingSample
from areal_sub.trajectory.tree import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Exactness:
    """The certificate of one rollout, or of several: each sampled token is counted once."""

    num_verbatim: int = 0  # trained: the engine read and sampled exactly this sequence
    masked: Mapping[Masked, int] = field(default_factory=Counter)  # not trained: tokens by cause
    forks: Mapping[Fork, int] = field(default_factory=Counter)  # turns by cause, `NONE` included

    def __add__(self, other: Exactness) -> Exactness:
        return Exactness(
            num_verbatim=self.num_verbatim + other.num_verbatim,
            masked=Counter(self.masked) + Counter(other.masked),
            forks=Counter(self.forks) + Counter(other.forks),
        )

    @property
    def num_masked(self) -> int:
        return sum(self.masked.values())

    @property
    def num_sampled(self) -> int:
        return self.num_verbatim + self.num_masked

    @property
    def num_due(self) -> int:
        """Tokens that were to be trained."""
        return self.num_verbatim + self.masked.get(Masked.NOT_VERBATIM, 0)

    @property
    def share(self) -> float:
        """Verbatim tokens of all that were due to be trained; 1.0 where none were."""
        return self.num_verbatim / self.num_due if self.num_due else 1.0

    def metrics(self) -> dict[str, float]:
        """Every cause always has its column."""
        return {
            "exactness/share_verbatim": self.share,
            "exactness/num_sampled_tokens": self.num_sampled,
            "exactness/num_verbatim_tokens": self.num_verbatim,
            **{f"exactness/num_masked_{cause}": self.masked.get(cause, 0) for cause in Masked},
            **{f"forks/{cause}": self.forks.get(cause, 0) for cause in Fork},
        }


def certify(trajectory: Trajectory, samples: RolloutSamples) -> tuple[RolloutSamples, Exactness]:
    """`samples` of `trajectory` with every span masked that the engine does not vouch for, and the
    rollout's certificate."""
    vouched = {turn.engine_digest for turn in trajectory.turns.values()}
    checked = [_certify(sample, vouched) for sample in samples.samples]
    num_unlike = sum(num for _, num in checked)
    masked = Counter(samples.masked)
    if num_unlike:
        masked[Masked.NOT_VERBATIM] = num_unlike
        samples = dataclasses.replace(
            samples, samples=tuple(sample for sample, _ in checked), masked=masked
        )
    return samples, Exactness(
        num_verbatim=sum(sample.num_trained_tokens for sample in samples.samples),
        masked=masked,
        forks=Counter(causes(trajectory).values()),
    )


def _certify(sample: TrainingSample, vouched: Collection[int]) -> tuple[TrainingSample, int]:
    """The sample with what is not vouched for masked, and how many tokens that were."""
    mask = sample.loss_mask.copy()
    num_unlike = 0
    edges = np.flatnonzero(np.diff(sample.loss_mask, prepend=False, append=False))
    for start, end in edges.reshape(-1, 2).tolist():
        if extend_digest(0, sample.token_ids[:end]) not in vouched:
            num_unlike += end - start
            mask[start:end] = False
    return dataclasses.replace(sample, loss_mask=mask) if num_unlike else sample, num_unlike
