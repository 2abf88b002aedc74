"""The rollouts of a run as a table, or as one JSON object per line. Pure but for the console."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from areal_sub.inspection.find import shown_id
from areal_sub.printable import one_line
from areal_sub.records import Fate, Fork, Outcome
from areal_sub.trajectory.accounting import Accounting, Judgement

_MAX_REASON_CHARS = 80
_PLAIN_FORKS = (Fork.NONE, Fork.ROOT)
_COLORS = {Fate.TRAINED: "green", Fate.EVALUATED: "cyan", Fate.UNACCOUNTED: "bold red"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which rollouts; all conditions hold."""

    failed: bool = False  # its outcome is known, and not `completed`
    not_trained: bool = False  # meant for training, and not trained
    reward_below: float | None = None  # its reward is known, and smaller
    split: str | None = None

    def takes(self, judgement: Judgement) -> bool:
        end = judgement.rollout.end
        if self.failed and (end is None or end.outcome is Outcome.COMPLETED):
            return False
        if self.not_trained and judgement.fate in (Fate.TRAINED, Fate.EVALUATED):
            return False
        if self.reward_below is not None:
            reward = reward_of(judgement)
            if reward is None or reward >= self.reward_below:
                return False
        return self.split is None or judgement.rollout.opened.split == self.split


def reward_of(judgement: Judgement) -> float | None:
    """The final reward, or the sum of the turns'; None where it did not complete, unless it was
    trained with a failure's reward."""
    end, decision = judgement.rollout.end, judgement.decision
    if end is None or end.outcome is not Outcome.COMPLETED:
        return None if decision is None else decision.failure_reward
    return sum(end.turn_rewards.values()) if end.reward is None else end.reward


def reason_of(judgement: Judgement) -> str:
    """One line, whoever wrote it: harmless for a terminal."""
    end = judgement.rollout.end
    failed = end is not None and end.outcome is not Outcome.COMPLETED
    return one_line(judgement.reason or (end.error if failed and end is not None else ""))


def as_json(judgement: Judgement) -> dict[str, Any]:
    log, decision = judgement.rollout, judgement.decision
    opened, end = log.opened, log.end
    return {
        "rollout_id": opened.rollout_id,
        "attempt": judgement.attempt.number,
        "group_id": opened.group_id,
        "task_id": opened.task_id,
        "agent": opened.agent,
        "split": opened.split,
        "outcome": None if end is None else str(end.outcome),
        "fate": str(judgement.fate),
        "reason": judgement.reason,
        "error": "" if end is None else end.error,
        "step": decision.step or None if decision else None,
        "reward": reward_of(judgement),
        "num_turns": log.num_turns,
        "num_sampled_tokens": log.num_sampled_tokens,
        "num_unanswered": len(log.unanswered),
        "num_trained_tokens": decision.num_trained_tokens if decision else 0,
        "num_uncertified_tokens": decision.num_uncertified_tokens if decision else 0,
        "forks": {str(fork): n for fork, n in log.forks.items() if fork not in _PLAIN_FORKS},
        "staleness": decision.staleness if decision else None,
        "policy_version": opened.policy_version,
        "opened_at": opened.opened_at,
        "wall_s": None if end is None else end.wall_s,
    }


def json_line(value: dict[str, Any]) -> str:
    """ASCII without control characters, so that a terminal may show it too."""
    return json.dumps(value).replace("\x7f", "\\u007f")


def table(judgements: Sequence[Judgement], *, resumed: bool) -> Table:
    """With the agents' names, where the run has several."""
    columns = [("rollout", "left"), ("task", "left"), ("split", "left"), ("outcome", "left")]
    columns += [("fate", "left"), ("reward", "right"), ("turns", "right")]
    columns += [("sampled", "right"), ("trained", "right"), ("forks", "right")]
    columns += [("stale", "right"), ("wall", "right"), ("why", "left")]
    with_agent = any(judgement.rollout.opened.agent for judgement in judgements)
    columns += [("agent", "left")] if with_agent else []
    made = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in columns:
        made.add_column(
            name,
            justify="right" if justify == "right" else "left",
            no_wrap=True,
            overflow="ellipsis",
        )
    for judgement in judgements:
        agent = [Text(one_line(judgement.rollout.opened.agent))] if with_agent else []
        made.add_row(*_cells(judgement, resumed=resumed), *agent)
    return made


def _cells(judgement: Judgement, *, resumed: bool) -> Iterable[Text]:
    row = as_json(judgement)
    step = f" {row['step']}" if judgement.fate is Fate.TRAINED else ""
    reason = reason_of(judgement)[:_MAX_REASON_CHARS]
    texts = [
        one_line(shown_id(judgement, resumed=resumed)),
        one_line(row["task_id"]),
        row["split"],
        row["outcome"] or "-",
        row["fate"] + step,
        "-" if row["reward"] is None else f"{row['reward']:.3f}",
        str(row["num_turns"]),
        str(row["num_sampled_tokens"]),
        str(row["num_trained_tokens"]),
        str(sum(row["forks"].values())),
        "-" if row["staleness"] is None else str(row["staleness"]),
        "-" if row["wall_s"] is None else f"{row['wall_s']:.1f} s",
        reason,
    ]
    color = _COLORS.get(judgement.fate, "yellow")
    return [Text(text, style=color if i == 4 else "") for i, text in enumerate(texts)]


def say_accounting(console: Console, accounting: Accounting) -> None:
    console.print(Text(f"rollouts: {accounting}"), soft_wrap=True)
    for problem in accounting.problems:
        text = f"error: rollouts are not accounted for: {one_line(problem)}"
        console.print(Text(text, style="bold red"), soft_wrap=True)
