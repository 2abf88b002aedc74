"""The exactness certificate: is what is trained what the engine read and sampled, token by token?

The engine sends with each token a CRC-32 over the prompt it read and all that it sampled so far
(`GenerateChunk.digests`). That number travels past rendering, capture, journal, stream, tree and
sample building on its own. Here the same CRC is taken over the finished training sample. A span of
trained tokens whose CRC is not among the engine's is masked and counted, never trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from areal_sub.records import extend_digest
from areal_sub.trajectory.samples import RolloutSamples, TrainingSample
from areal_sub.trajectory.tree import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Exactness:
    """Counts of sampled tokens that were due to be trained."""

    num_verbatim: int = 0  # the engine read and sampled exactly this sequence
    num_masked: int = 0  # it did not: left out

    def __add__(self, other: Exactness) -> Exactness:
        return Exactness(
            num_verbatim=self.num_verbatim + other.num_verbatim,
            num_masked=self.num_masked + other.num_masked,
        )

    @property
    def share(self) -> float:
        """Verbatim tokens of all that were due; 1.0 where none were."""
        return self.num_verbatim / max(1, self.num_verbatim + self.num_masked)


def certify(trajectory: Trajectory, samples: RolloutSamples) -> tuple[RolloutSamples, Exactness]:
    """`samples` of `trajectory` with every span masked that the engine does not vouch for."""
    vouched = {turn.engine_digest for turn in trajectory.turns.values()}
    checked = [_certify(sample, vouched) for sample in samples.samples]
    total = sum((exactness for _, exactness in checked), Exactness())
    if total.num_masked:
        samples = dataclasses.replace(samples, samples=tuple(sample for sample, _ in checked))
    return samples, total


def _certify(sample: TrainingSample, vouched: Collection[int]) -> tuple[TrainingSample, Exactness]:
    mask = sample.loss_mask.copy()
    num_verbatim = num_masked = 0
    edges = np.flatnonzero(np.diff(sample.loss_mask, prepend=False, append=False))
    for start, end in edges.reshape(-1, 2).tolist():
        if extend_digest(0, sample.token_ids[:end]) in vouched:
            num_verbatim += end - start
        else:
            num_masked += end - start
            mask[start:end] = False
    exactness = Exactness(num_verbatim=num_verbatim, num_masked=num_masked)
    return dataclasses.replace(sample, loss_mask=mask) if num_masked else sample, exactness
