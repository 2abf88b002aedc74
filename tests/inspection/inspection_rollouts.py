"""Rollouts to inspect: three turns, of which the third forks from the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from areal_sub.records import (
    BeganRecord,
    EndRecord,
    Fate,
    FateRecord,
    Fork,
    OpenRecord,
    Outcome,
    TurnRecord,
    extend_digest,
    float32,
    int32,
)
from areal_sub.trajectory.accounting import Judgement
from areal_sub.trajectory.journal import Journal
from areal_sub.trajectory.run_log import AttemptLog, RolloutLog
from areal_sub.trajectory.tree import Trajectory


def opened(rollout_id: str = "r", split: str = "train", task_id: str = "t") -> OpenRecord:
    return OpenRecord(
        rollout_id=rollout_id, group_id="g", task_id=task_id, split=split, policy_version=0,
        opened_at=0.0,
    )  # fmt: skip


def turn(
    turn_id: str,
    before: Sequence[int],
    context: Sequence[int],
    sampled: Sequence[int],
    *,
    parent: str | None = None,
    fork: Fork = Fork.ROOT,
    vouched: bool = True,
    rollout_id: str = "r",
) -> TurnRecord:
    return TurnRecord(
        rollout_id=rollout_id, turn_id=turn_id, parent_turn_id=parent, fork=fork,
        context_token_ids=int32(context), token_ids=int32(sampled),
        rollout_logprobs=float32([-0.5] * len(sampled)), versions=int32([0] * len(sampled)),
        finish_reason="stop", dialect="chat", model="m", temperature=1.0, top_p=1.0,
        started_at=0.0, ended_at=0.0, num_prompt_tokens=len(before) + len(context),
        engine_digest=extend_digest(0, int32([*before, *context, *sampled])) if vouched else 7,
    )  # fmt: skip


def turns(vouched: Sequence[str] = "abc", rollout_id: str = "r") -> list[TurnRecord]:
    a, edited = [1, 2, 3, 4], Fork.HISTORY_EDITED
    return [
        turn("a", [], [1, 2], [3, 4], vouched="a" in vouched, rollout_id=rollout_id),
        turn("b", a, [5], [6, 7, 8], parent="a", fork=Fork.NONE, vouched="b" in vouched,
             rollout_id=rollout_id),
        turn("c", a, [5, 9], [6], parent="a", fork=edited, vouched="c" in vouched,
             rollout_id=rollout_id),
    ]  # fmt: skip


def end(
    rollout_id: str = "r",
    outcome: Outcome = Outcome.COMPLETED,
    *,
    reward: float | None = 1.0,
    turn_rewards: Mapping[str, float] | None = None,
    num_turns: int = 3,
    error: str = "",
    stdout: str = "",
) -> EndRecord:
    return EndRecord(
        rollout_id=rollout_id, outcome=outcome, reward=None if turn_rewards else reward,
        turn_rewards=dict(turn_rewards or {}), error=error, traceback="", stdout_tail=stdout,
        stderr_tail="", wall_s=2.0, cpu_s=1.0, max_rss_bytes=2**21, num_turns=num_turns,
        num_rejected_calls=0, ended_at=0.0,
    )  # fmt: skip


def forked(*, turn_rewards: Mapping[str, float], vouched: Sequence[str] = "abc") -> Trajectory:
    return Trajectory.build(opened(), turns(vouched), end(turn_rewards=turn_rewards))


def began(
    *, style: str = "concat", discount: float = 1.0, kl: bool = False, credit: str = "all"
) -> BeganRecord:
    return BeganRecord(
        policy_version=0, began_at=0.0, export_style=style, turn_discount=discount,
        trains_without_advantage=kl, tokenizer_path="", credit=credit,
    )  # fmt: skip


def decided(
    fate: Fate, *, mean: float = 0.0, scale: float = 1.0, rollout_id: str = "r"
) -> FateRecord:
    return FateRecord(
        rollout_id=rollout_id, fate=fate, reason="", policy_version=0, decided_at=0.0, step=1,
        staleness=0, num_trained_tokens=6 if fate is Fate.TRAINED else 0, baseline_mean=mean,
        baseline_scale=scale,
    )  # fmt: skip


def judged(
    fate: Fate,
    trajectory: Trajectory,
    *,
    mean: float = 0.0,
    scale: float = 1.0,
    attempt_began: BeganRecord | None = None,
) -> Judgement:
    attempt = AttemptLog(
        number=1, journal=Path("none"), is_live=False, began=attempt_began or began()
    )
    log = RolloutLog(
        opened=trajectory.open,
        end=trajectory.end,
        decisions=[decided(fate, mean=mean, scale=scale)],
    )
    return Judgement(attempt=attempt, rollout=log, fate=fate, reason="")


def write(path: Path, records: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(path)
    for record in records:
        journal.append(record)  # type: ignore[arg-type]
    journal.close()
    return path
