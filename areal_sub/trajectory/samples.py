"""Trajectory → training samples. Pure, numpy only; called by the trainer for each finished rollout.

Invariants: with either export style each sampled token of the trajectory is trained in exactly one
sample, with the logprob and the policy version that it was sampled with, or is counted as masked
under one cause (`causes.py` decides which were lost, and which branch is the main one); a sample's
tokens are a turn's full sequence as recorded, so nothing is ever tokenized again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from areal_sub.errors import RecordError
from areal_sub.records import Float32Array, Int32Array, Masked, TurnRecord, float32
from areal_sub.trajectory.causes import before, lost_answers, main_branch
from areal_sub.trajectory.tree import Trajectory

ExportStyle = Literal["concat", "individual"]
Credit = Literal["all", "main", "per_branch"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingSample:
    """One flat token sequence with its loss mask. All arrays have the same length [L]."""

    rollout_id: str
    group_id: str
    token_ids: Int32Array
    loss_mask: NDArray[np.bool_]  # True where the token was sampled and is trained in this sample
    rollout_logprobs: Float32Array  # the sampler's; 0 where not trained
    versions: Int32Array  # policy version that sampled the token; -1 where not trained
    returns: Float32Array  # return of the token's turn; 0 where not trained

    @property
    def num_trained_tokens(self) -> int:
        return int(self.loss_mask.sum())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RolloutSamples:
    """What one rollout gives to the learner."""

    rollout_id: str
    group_id: str
    reward: float  # the final reward, or the sum of the turns' rewards where they were given
    turn_returns: Float32Array  # [num_turns] of those that are trained, in order of creation
    samples: tuple[TrainingSample, ...]
    masked: Mapping[Masked, int]  # sampled tokens that no sample trains, by cause

    @property
    def mean_return(self) -> float:
        """Mean over turns; without turns the reward."""
        return float(self.turn_returns.mean()) if self.turn_returns.size else self.reward


def rollout_samples(
    trajectory: Trajectory, *, export_style: ExportStyle, turn_discount: float, credit: Credit
) -> RolloutSamples:
    """All training samples of a rollout.

    `concat`: one per root-to-leaf branch, leaves in order of creation; a token that several
    branches share is trained in the first of them and is context in the others. `individual`: one
    per turn, its prompt and what was sampled. Branches and turns that sampled nothing of their own
    give no sample. A rollout without a reward (it failed) counts as reward 0.

    Answers that the agent never saw are not trained, whatever `credit` says. `all`: everything else
    is, with returns in order of creation. `main`: the main branch only, as if the agent had made no
    other call. `per_branch`: everything, with each turn's return from its own branch.

    Raises `RecordError` where a sampled token follows nothing, so that nothing predicts it.
    """
    end = trajectory.end
    masked_as = masked_turns(trajectory, credit)
    turn_ids = [turn_id for turn_id in trajectory.turns if turn_id not in masked_as]
    if credit == "per_branch":
        values = branch_returns(trajectory, turn_ids, turn_discount=turn_discount)
    else:
        values = turn_returns(
            turn_ids, reward=end.reward, turn_rewards=end.turn_rewards, turn_discount=turn_discount
        )
    returns = dict(zip(turn_ids, values.tolist(), strict=True))
    samples: list[TrainingSample] = []
    for branch, own in sample_branches(trajectory, export_style, masked_as):
        samples.append(_sample(trajectory, branch, own, returns))
    masked: Counter[Masked] = Counter()
    for turn_id, cause in masked_as.items():
        masked[cause] += len(trajectory.turns[turn_id].token_ids)
    return RolloutSamples(
        rollout_id=trajectory.open.rollout_id,
        group_id=trajectory.open.group_id,
        reward=trajectory.reward,
        turn_returns=values,
        samples=tuple(samples),
        masked=masked,
    )


def sample_branches(
    trajectory: Trajectory, export_style: ExportStyle, masked: Collection[str]
) -> Iterator[tuple[list[TurnRecord], set[str]]]:
    """Of each training sample, in order: its turns, and the ids of those that it trains.

    `masked`: the ids of turns that none is to train.
    """
    due = {turn.turn_id for turn in trajectory.turns.values() if len(turn.token_ids)}
    due.difference_update(masked)
    if export_style == "individual":
        for turn_id in trajectory.turns:
            if turn_id in due:
                yield trajectory.branch(turn_id), {turn_id}
        return
    # A turn is rather trained where what follows it is trained, too.
    for branch in sorted(trajectory.branches(), key=lambda b: b[-1].turn_id in masked):
        own = {turn.turn_id for turn in branch} & due
        due -= own
        if own:
            yield branch, own


def masked_turns(trajectory: Trajectory, credit: Credit) -> dict[str, Masked]:
    """The turns that are not due to be trained, and why."""
    masked_as = dict.fromkeys(lost_answers(trajectory), Masked.LOST_ANSWER)
    if credit == "main":
        for turn_id in trajectory.turns.keys() - main_branch(trajectory):
            masked_as.setdefault(turn_id, Masked.SIDE_BRANCH)
    return masked_as


def turn_returns(
    turn_ids: Sequence[str],
    *,
    reward: float | None,
    turn_rewards: Mapping[str, float],
    turn_discount: float,
) -> Float32Array:
    """Return of each turn, `turn_ids` being in order of creation: [num_turns].

    AReaL's rule, backward: `return[i] = reward[i] + turn_discount * return[i + 1]`. A final
    `reward` is the last turn's; turns that are not in `turn_rewards` have 0. The tree plays no
    part: a sub-agent's turns lead to the final reward as much as the main branch does.
    """
    rewards = [turn_rewards.get(turn_id, 0.0) for turn_id in turn_ids]
    if reward is not None and rewards:
        rewards[-1] = reward
    for i in range(len(rewards) - 2, -1, -1):
        rewards[i] += turn_discount * rewards[i + 1]
    return float32(rewards)


def branch_returns(
    trajectory: Trajectory, turn_ids: Sequence[str], *, turn_discount: float
) -> Float32Array:
    """Return of each of `turn_ids` from its own branches: [num_turns].

    `return[turn] = reward[turn] + turn_discount * mean(return of the turns that go on from it)`.
    Where the agent gave rewards by turn, a branch on which none was given has the rollout's reward
    at its end; where it gave one final reward, every branch has that one.
    """
    end = trajectory.end
    own = set(turn_ids)
    rewarded: dict[str, bool] = {}  # whether the way to the turn holds a reward of its own
    following: dict[str, list[str]] = {}
    for turn_id in turn_ids:
        previous = before(trajectory.turns[turn_id])
        rewarded[turn_id] = turn_id in end.turn_rewards or rewarded.get(previous or "", False)
        if previous in own:
            following.setdefault(previous, []).append(turn_id)
    returns: dict[str, float] = {}
    for turn_id in reversed(turn_ids):
        reward = end.turn_rewards.get(turn_id, 0.0)
        later = [returns[other] for other in following.get(turn_id, ())]
        if later:
            reward += turn_discount * sum(later) / len(later)
        elif not rewarded[turn_id]:
            reward = trajectory.reward
        returns[turn_id] = reward
    return float32([returns[turn_id] for turn_id in turn_ids])


def _sample(
    trajectory: Trajectory,
    branch: Sequence[TurnRecord],
    trained: set[str],
    returns: Mapping[str, float],
) -> TrainingSample:
    """The sample of `branch` that trains the turns `trained`."""
    length = sum(len(turn.context_token_ids) + len(turn.token_ids) for turn in branch)
    sample = TrainingSample(
        rollout_id=trajectory.open.rollout_id,
        group_id=trajectory.open.group_id,
        token_ids=np.empty(length, dtype=np.int32),
        loss_mask=np.zeros(length, dtype=np.bool_),
        rollout_logprobs=np.zeros(length, dtype=np.float32),
        versions=np.full(length, -1, dtype=np.int32),
        returns=np.zeros(length, dtype=np.float32),
    )
    start = 0
    for turn in branch:
        sampled_at = start + len(turn.context_token_ids)
        end = sampled_at + len(turn.token_ids)
        sample.token_ids[start:sampled_at] = turn.context_token_ids
        sample.token_ids[sampled_at:end] = turn.token_ids
        if turn.turn_id in trained:
            sample.loss_mask[sampled_at:end] = True
            sample.rollout_logprobs[sampled_at:end] = turn.rollout_logprobs
            sample.versions[sampled_at:end] = turn.versions
            sample.returns[sampled_at:end] = returns[turn.turn_id]
        start = end
    if sample.loss_mask[0]:
        raise RecordError(
            f"rollout {sample.rollout_id}, turn {branch[0].turn_id}: tokens sampled from an empty "
            "prompt: nothing predicts the first of them"
        )
    return sample
