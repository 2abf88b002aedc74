"""What is done about rollouts that failed: by whose fault it was, and the configuration. Pure.

An agent's fault (it raised, hung, ate too much) and the policy's (its conversation outgrew the
model) say something of the policy: they can be given a reward and trained. Our own infrastructure's
say nothing of it: they are tried again, a few times by kind, and then left out of the group's
baseline. Called by `rollout/groups.py`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from areal_sub.config.schema import FailuresConfig
from areal_sub.records import Fault, Outcome
from areal_sub.trajectory.tree import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class FailurePolicy:
    """`rollout.failures`."""

    agent_reward: float | None = None
    policy_reward: float | None = None
    retries: Mapping[Outcome, int] = field(default_factory=dict)
    incomplete_groups: Literal["fill", "survivors", "drop"] = "survivors"

    @classmethod
    def of(cls, config: FailuresConfig) -> FailurePolicy:
        return cls(
            agent_reward=config.agent_reward,
            policy_reward=config.policy_reward,
            retries={Outcome(kind): number for kind, number in config.retries.items()},
            incomplete_groups=config.incomplete_groups,
        )

    def rewarded(self, trajectory: Trajectory) -> Trajectory:
        """With the reward that the configuration gives for such a failure, if it is one."""
        reward = {
            Fault.AGENT: self.agent_reward,
            Fault.POLICY: self.policy_reward,
        }.get(trajectory.end.outcome.fault)
        if reward is None or not trajectory.turns:  # nothing of it could be trained
            return trajectory
        end = dataclasses.replace(trajectory.end, reward=reward, turn_rewards={})
        return dataclasses.replace(trajectory, end=end)

    def tries_again(self, outcome: Outcome, retried: Counter[Outcome]) -> bool:
        """Whether a rollout that ended so is run again; `retried`: how often it was, by outcome."""
        is_ours = outcome.fault is Fault.INFRASTRUCTURE
        return is_ours and retried[outcome] < self.retries.get(outcome, 0)

    def num_missing(self, num_usable: int, num_samples: int, num_extra: int) -> int:
        """How many more rollouts a group needs now; `num_extra` were added to it before."""
        if self.incomplete_groups != "fill":
            return 0
        return max(0, min(num_samples - num_usable, num_samples - num_extra))

    def min_survivors(self, num_samples: int, at_least: int) -> int:
        """With how many usable rollouts a group is trained."""
        return max(at_least, num_samples) if self.incomplete_groups == "drop" else at_least
