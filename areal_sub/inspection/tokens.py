"""Why each token of a rollout was trained or not. Pure.

Nothing of this is recorded per token: the training samples are made again from the journal's turns
by the functions that made them for the learner, and the ledger's one record says the rest (the
step, the group's baseline). So what is shown is what was done, as long as those functions are pure.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import cast

import numpy as np

from areal_sub.records import Fate, Masked, TurnRecord
from areal_sub.trainer.exactness import certify
from areal_sub.trajectory.accounting import Judgement
from areal_sub.trajectory.samples import (
    Credit,
    ExportStyle,
    TrainingSample,
    masked_turns,
    rollout_samples,
    sample_branches,
)
from areal_sub.trajectory.tree import Trajectory

TRAINED = "trained"
# Why a token was not trained; besides these, the label of the whole rollout (`stale`, `timeout`).
CAUSES = {
    "context": "not sampled by the policy: messages, tool results, the template's own tokens",
    "shared": "sampled; trained in another sample of this rollout, of which it is a part too",
    Masked.LOST_ANSWER: "sampled, but the agent never saw it: it repeated the call",
    Masked.SIDE_BRANCH: "sampled, but not on the main branch, which alone is trained (credit=main)",
    "uncertified": "sampled, but the engine does not vouch for the sequence up to it",
    "zero_advantage": "in a training step, but the turn did exactly as well as the group",
}
# What a rollout's fate means, for those who read it.
FATES = {
    Fate.TRAINED: "a training step learned from it",
    Fate.EVALUATED: "a validation rollout: it counts there, and is never trained",
    Fate.FAILED: "its agent did not return a valid reward",
    Fate.RETRIED: "our own processes failed it, and another took its place",
    Fate.STALE: "sampled by a policy that was too old by then (rollout.max_head_offpolicyness)",
    Fate.NO_BASELINE: "fewer than two of its group could be trained: nothing to compare it with",
    Fate.NO_SIGNAL: "in a training step, with advantage 0: nothing to learn",
    Fate.UNCERTIFIED: "the engine vouches for none of its tokens",
    Fate.SKIPPED: "the gradient of its training step was not finite, and was left out",
    Fate.UNUSED: "the run ended before it was used",
    Fate.UNDONE: "trained, but the run was resumed from before that step",
    Fate.CRASHED: "the run went down before it was used",
    Fate.RUNNING: "it is running now",
    Fate.WAITING: "it has ended, and waits for its group or for a training step",
    Fate.UNACCOUNTED: "nobody decided on it: a defect of areal-sub, please report it",
}
_IN_A_STEP = (Fate.TRAINED, Fate.NO_SIGNAL, Fate.UNCERTIFIED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Tokens of one turn, next to one another, with one answer."""

    turn_id: str
    start: int  # in the sample
    end: int
    why: str  # `TRAINED`, a key of `CAUSES`, or the rollout's label
    advantage: float | None  # of trained tokens, and of those that had none to train


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExplainedSample:
    sample: TrainingSample
    spans: tuple[Span, ...]  # all tokens, in order


def explain(judgement: Judgement, trajectory: Trajectory) -> list[ExplainedSample]:
    """The training samples of a rollout. Raises `RecordError` where its records make none."""
    began, decision = judgement.attempt.began, judgement.decision
    style = cast(ExportStyle, began.export_style if began else "concat")
    credit = _credit(judgement)
    if decision is not None and decision.failure_reward is not None:
        rewarded = dataclasses.replace(
            trajectory.end, reward=decision.failure_reward, turn_rewards={}
        )
        trajectory = dataclasses.replace(trajectory, end=rewarded)
    samples = rollout_samples(
        trajectory,
        export_style=style,
        turn_discount=began.turn_discount if began else 1.0,
        credit=credit,
    )
    masked_as = masked_turns(trajectory, credit)
    certified, _ = certify(trajectory, samples)
    explained: list[ExplainedSample] = []
    branches = sample_branches(trajectory, style, masked_as)
    for (branch, own), sample in zip(branches, certified.samples, strict=True):
        spans: list[Span] = []
        start = 0
        for turn in branch:
            sampled_at = start + len(turn.context_token_ids)
            end = sampled_at + len(turn.token_ids)
            if sampled_at > start:
                spans.append(_span(turn, start, sampled_at, "context"))
            if turn.turn_id in masked_as:
                spans.append(_span(turn, sampled_at, end, masked_as[turn.turn_id]))
            elif turn.turn_id not in own:
                spans.append(_span(turn, sampled_at, end, "shared"))
            elif judgement.fate not in _IN_A_STEP or decision is None:
                spans.append(_span(turn, sampled_at, end, judgement.label))
            elif not sample.loss_mask[sampled_at]:  # a turn is certified whole, or not at all
                spans.append(_span(turn, sampled_at, end, "uncertified"))
            else:
                deviation = np.float64(sample.returns[sampled_at]) - decision.baseline_mean
                advantage = float(np.float32(deviation * decision.baseline_scale))
                always = began is not None and began.trains_without_advantage
                why = TRAINED if advantage or always else "zero_advantage"
                spans.append(_span(turn, sampled_at, end, why, advantage))
            start = end
        explained.append(ExplainedSample(sample=sample, spans=tuple(spans)))
    return explained


def turn_causes(
    judgement: Judgement, trajectory: Trajectory, explained: list[ExplainedSample]
) -> dict[str, Span]:
    """Of each turn: the span of its sampled tokens in the sample that is to train it, or why none
    is to (the span is then of the turn's tokens alone)."""
    masked_as = masked_turns(trajectory, _credit(judgement)) if explained else {}
    return {
        turn_id: _span(turn, 0, len(turn.token_ids), cause)
        for turn_id, cause in masked_as.items()
        if len((turn := trajectory.turns[turn_id]).token_ids)
    } | {
        span.turn_id: span
        for each in explained
        for span in each.spans
        if span.why not in ("context", "shared")
    }


def _credit(judgement: Judgement) -> Credit:
    began = judgement.attempt.began
    return cast(Credit, began.credit if began else "all")


def _span(turn: TurnRecord, start: int, end: int, why: str, advantage: float | None = None) -> Span:
    return Span(turn_id=turn.turn_id, start=start, end=end, why=why, advantage=advantage)
