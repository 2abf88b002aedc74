"""What a few rollouts of an agent show of it. Pure: trajectories in, findings out.

Called by `command.py`. A finding has a sentence that says what to do where something is amiss.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from areal_sub.proxy.tampering import Sign
from areal_sub.records import Fork, Masked, Outcome, TurnRecord
from areal_sub.trainer.exactness import Exactness, certify
from areal_sub.trajectory.causes import main_branch
from areal_sub.trajectory.samples import rollout_samples
from areal_sub.trajectory.tree import Trajectory

MAX_TEXT_CHARS = 2000

ADVICE = {
    Fork.HISTORY_EDITED: "it changes messages that it has sent before",
    Fork.ASSISTANT_EDITED: "it sends answers back otherwise than it got them (trimmed, or parsed "
    "and written anew): keep content and tool calls as they came",
    Fork.REASONING_DROPPED: "it leaves out what answers had thought: send reasoning back, too",
    Fork.SYSTEM_CHANGED: "its system message changes between calls (a clock, a counter?): put what "
    "changes into the last message",
    Fork.TOOLS_CHANGED: "its tools change between calls: offer the same ones in the same order",
    Fork.TEMPLATE_REWROTE: "the chat template renders the longer conversation differently",
}
"""Of forks that a change to the agent would avoid. Others are how an agent works."""

MODEL_HOSTS = frozenset(
    ("api.openai.com", "api.anthropic.com", "generativelanguage.googleapis.com", "openrouter.ai")
)
"""Where agents ask that have not seen the policy's address."""

_CALLED_WRONG = re.compile(r"TypeError: (?:\S+\.)?(\w+)\(\) (?:takes|missing|got an unexpected)")

NEUTRAL = (Fork.NONE, Fork.ROOT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One rollout."""

    outcome: Outcome
    reward: float | None
    turn_rewards: dict[str, float]
    error: str
    traceback: str
    stderr_tail: str
    num_calls: int
    num_refused: int
    wall_s: float

    @classmethod
    def of(cls, trajectory: Trajectory) -> Attempt:
        end = trajectory.end
        return cls(
            outcome=end.outcome,
            reward=end.reward,
            turn_rewards=end.turn_rewards,
            error=end.error,
            traceback=end.traceback[-MAX_TEXT_CHARS:],
            stderr_tail=end.stderr_tail[-MAX_TEXT_CHARS:],
            num_calls=end.num_turns,
            num_refused=end.num_rejected_calls,
            wall_s=end.wall_s,
        )

    @property
    def not_begun(self) -> str:
        """What to do where it ended because it cannot be called as agents are; else ""."""
        called = _CALLED_WRONG.match(self.error)
        if called is None or self.num_calls or self.num_refused:
            return ""
        if called[1] == "__init__":
            return "its constructor wants what it was not given: workflow_kwargs.NAME=VALUE"
        return (
            "an agent is called with the task: async def agent(data), or in a class "
            "async def run(self, data, **extra_kwargs)"
        )

    @property
    def has_reward(self) -> bool:
        return self.reward is not None or bool(self.turn_rewards)


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    attempts: tuple[Attempt, ...]
    dialects: dict[str, int]  # calls by dialect
    models: dict[str, int]  # calls by the model's name that the agent gave
    num_streamed: int
    num_offering_tools: int
    num_calling_tools: int  # answers that called one
    num_constrained: int  # structured output, or a forced tool
    num_retries: int
    num_cut: int  # answers that the agent did not wait for
    num_side_requests: int  # calls outside the main conversation
    forks: dict[str, int]  # turns by cause, where they do not simply go on
    masked: dict[str, int]  # sampled tokens that would not be trained, by cause
    share_verbatim: float
    egress_refused: dict[str, int] = field(default_factory=dict)  # host:port → attempts
    tampering: dict[str, int] = field(default_factory=dict)  # sign → how often
    notes: tuple[str, ...] = ()  # what is amiss, and what to do

    @property
    def is_exact(self) -> bool:
        """Every token that it would train on is one that was sampled, in its context."""
        return bool(self.dialects) and self.share_verbatim == 1.0

    @property
    def is_trainable(self) -> bool:
        return self.is_exact and all(
            attempt.outcome is Outcome.COMPLETED and attempt.has_reward for attempt in self.attempts
        )

    def to_map(self) -> dict[str, Any]:
        return {
            "trainable": self.is_trainable,
            "token_exact": self.is_exact,
            **dataclasses.asdict(self),
        }


def findings_of(
    trajectories: Sequence[Trajectory], *, max_turns: int, notes: Sequence[str] = ()
) -> Findings:
    """`notes`: what is known beside the trajectories."""
    turns = [turn for trajectory in trajectories for turn in trajectory.turns.values()]
    exactness = sum((_certificate(trajectory) for trajectory in trajectories), Exactness())
    egress: Counter[str] = Counter()
    tampering: Counter[str] = Counter()
    for trajectory in trajectories:
        egress.update(trajectory.end.egress_refused)
        tampering.update(trajectory.end.tampering)
    forks = {str(cause): num for cause, num in exactness.forks.items() if cause not in NEUTRAL}
    found = Findings(
        attempts=tuple(Attempt.of(trajectory) for trajectory in trajectories),
        dialects=dict(Counter(turn.dialect for turn in turns)),
        models=dict(Counter(turn.model for turn in turns)),
        num_streamed=sum(turn.streamed for turn in turns),
        num_offering_tools=sum(turn.num_tools > 0 for turn in turns),
        num_calling_tools=sum(turn.finish_reason == "tool_calls" for turn in turns),
        num_constrained=sum(turn.constrained for turn in turns),
        num_retries=sum(turn.retry > 0 for turn in turns),
        num_cut=sum(turn.finish_reason == "aborted" for turn in turns),
        num_side_requests=sum(map(_num_aside, trajectories)),
        forks=forks,
        masked={str(cause): num for cause, num in exactness.masked.items() if num},
        share_verbatim=exactness.share,
        egress_refused=dict(egress),
        tampering=dict(tampering),
    )
    notes = (*notes, *_notes(found, exactness, turns, max_turns))
    return dataclasses.replace(found, notes=notes)


def _certificate(trajectory: Trajectory) -> Exactness:
    samples = rollout_samples(trajectory, export_style="concat", turn_discount=1.0, credit="all")
    return certify(trajectory, samples)[1]


def _num_aside(trajectory: Trajectory) -> int:
    return len(trajectory.turns) - len(main_branch(trajectory))


def _notes(
    found: Findings, exactness: Exactness, turns: Sequence[TurnRecord], max_turns: int
) -> list[str]:
    notes: list[str] = []
    if num_refused := sum(attempt.num_refused for attempt in found.attempts):
        notes.append(
            f"{num_refused} of its calls {'was' if num_refused == 1 else 'were'} refused: the "
            "error that it got says why (docs/dialects.md lists what cannot be done)"
        )
    for attempt in found.attempts:
        if attempt.outcome is not Outcome.COMPLETED:
            notes.append(f"a run ended as {attempt.outcome}: {attempt.error or 'see its output'}")
            if attempt.not_begun:
                notes.append(attempt.not_begun)
            if attempt.num_calls:
                notes.append(
                    "if that is of what the scripted model said (it knows no format that a prompt "
                    "asks for): --script FILE gives it other answers"
                )
        elif not attempt.has_reward:
            notes.append(
                "it returned no reward: return a number, print one last, or set a grader "
                "(rollout.openai.reward)"
            )
        if attempt.num_calls >= max_turns:
            notes.append(
                f"a run made all of its {max_turns} calls: it may not stop by itself, or the "
                "scripted answers never satisfy it (--script FILE gives it others)"
            )
    has_begun = not all(attempt.not_begun for attempt in found.attempts)
    if has_begun and not (turns or num_refused or Sign.UNKNOWN_ROUTE in found.tampering):
        notes.append(
            "it made no model call: it must read OPENAI_BASE_URL, ANTHROPIC_BASE_URL or the like "
            "(docs/agents.md lists them) and have no fixed address"
        )
    for cause, advice in ADVICE.items():
        if num := exactness.forks.get(cause, 0):
            notes.append(f"{num} of its calls forked ({cause}): {advice}")
    if num := exactness.masked.get(Masked.LOST_ANSWER, 0):
        notes.append(
            f"{num} tokens of answers that it never saw: its time limit for a call may be too short"
        )
    if found.share_verbatim < 1.0:
        notes.append(
            f"only {100 * found.share_verbatim:.2f} % of what would be trained is what was "
            "sampled: this is a fault of areal-sub, please report it"
        )
    if found.num_side_requests:
        notes.append(
            f"{found.num_side_requests} calls are outside its main conversation (titles, routers, "
            "sub-agents): rollout.openai.credit=main keeps them out of training"
        )
    for where, num in found.egress_refused.items():
        if where.partition(":")[0] in MODEL_HOSTS:
            notes.append(
                f"it asked {where} for a model {num} times: it must read its address "
                "(docs/agents.md lists the variables) when it runs; when its module is imported, "
                "there is none yet"
            )
            continue
        notes.append(
            f"it tried {num} times to reach {where}: if it needs that, "
            f"rollout.openai.sandbox.network.allow=[{where}]"
        )
    tampering = dict(found.tampering)
    if num := tampering.pop(Sign.UNKNOWN_ROUTE, 0):
        notes.append(
            f"{num} of its calls asked for what is not served (docs/dialects.md lists what is): "
            "another API, or a base URL with /v1 too often or not at all"
        )
    if tampering:
        told = ", ".join(f"{sign} ({num})" for sign, num in tampering.items())
        notes.append(f"calls that an agent has no business to make: {told} (docs/rewards.md)")
    return list(dict.fromkeys(notes))
