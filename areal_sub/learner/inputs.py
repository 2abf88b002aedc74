"""What the learner needs to know of a rollout. Satisfied by `areal_sub.trajectory.samples`.

Protocols, as `learner` and `trajectory` are siblings that do not import one another: the learner
can be driven from any source of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from areal_sub.records import Float32Array, Int32Array


class TokenSample(Protocol):
    """One flat token sequence. All arrays have the same length [L]."""

    @property
    def token_ids(self) -> Int32Array: ...

    @property
    def loss_mask(self) -> NDArray[np.bool_]:
        """True where the token was sampled and is trained in this sample. Never at position 0."""
        ...

    @property
    def rollout_logprobs(self) -> Float32Array:
        """The sampler's logprob of each trained token; 0 elsewhere."""
        ...

    @property
    def versions(self) -> Int32Array:
        """The policy version that sampled each trained token."""
        ...


class Sample(TokenSample, Protocol):
    """The same, and what each trained token's turn was worth."""

    @property
    def returns(self) -> Float32Array:
        """The return of each trained token's turn; 0 elsewhere."""
        ...


class Rollout(Protocol):
    """One rollout of a group."""

    @property
    def mean_return(self) -> float:
        """Mean return of its turns: its vote in the group's baseline."""
        ...

    @property
    def samples(self) -> Sequence[Sample]: ...


Group = Sequence[Rollout]
