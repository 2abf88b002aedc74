"""How many groups may be started now, and which trajectories are too old to train. Pure.

The admission rule is AReaL's (arXiv:2505.24298, section 5.1): groups ever started minus groups
given up may not exceed (policy version + eta + 1) batches, so that no batch is sampled by a policy
more than eta = `max_head_offpolicyness` versions behind the one that trains on it, as long as
rollouts end in the order of their starts. One that takes longer than the steps it may span comes
out too old all the same: it is dropped, or kept and re-weighted (`rollout.over_stale`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """The limits; all counts are groups unless the name says rollouts."""

    batch_size: int
    max_head_offpolicyness: int
    max_concurrent_rollouts: int
    num_samples: int  # rollouts per group
    keeps_stale: bool = False  # what is older than eta is trained with importance weights

    def num_startable(
        self, *, version: int, num_consumed: int, num_pending: int, num_running_rollouts: int
    ) -> int:
        """Groups that may start now.

        `num_consumed` groups were trained; `num_pending` were started and not yet trained.
        A group is started whole, so at least one may run however small the rollout limit is.
        """
        by_staleness = (
            (version + self.max_head_offpolicyness + 1) * self.batch_size
            - num_consumed
            - num_pending
        )
        free_rollouts = self.max_concurrent_rollouts - num_running_rollouts
        by_concurrency = -(-free_rollouts // self.num_samples) if free_rollouts > 0 else 0
        return max(0, min(by_staleness, by_concurrency))

    def is_too_old(self, age: int) -> bool:
        """Whether a trajectory of this staleness may not be trained any more."""
        return age > self.max_head_offpolicyness and not self.keeps_stale


def staleness(version: int, oldest_version: int) -> int:
    """Versions between the trainer's policy and the oldest sampled token of a trajectory."""
    return version - oldest_version
