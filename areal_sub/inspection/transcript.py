"""One rollout in full: how it ended, its tree of turns, what was said, and token by token why."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from areal_sub.errors import RecordError
from areal_sub.inspection.listing import as_json, reason_of
from areal_sub.inspection.text import Decoder
from areal_sub.inspection.tokens import (
    CAUSES,
    FATES,
    TRAINED,
    ExplainedSample,
    Span,
    explain,
    turn_causes,
)
from areal_sub.printable import escaped, one_line
from areal_sub.records import EndRecord, Fork, Int32Array, OpenRecord, Outcome, TurnRecord
from areal_sub.trajectory.accounting import Judgement
from areal_sub.trajectory.causes import causes
from areal_sub.trajectory.run_log import read_rollout
from areal_sub.trajectory.tree import Trajectory


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Inspected:
    """One rollout, with all that its journal holds."""

    judgement: Judgement
    trajectory: Trajectory
    ended: bool  # False: its end record is not there, and what it says is made up
    explained: list[ExplainedSample]
    problem: str  # "" or why `explained` is empty: the records make no samples

    @classmethod
    def read(cls, judgement: Judgement) -> Inspected:
        """Raises `RecordError` where the rollout's records do not fit together."""
        rollout_id = judgement.rollout.opened.rollout_id
        opened, turns, end = read_rollout(judgement.attempt.journal, rollout_id)
        trajectory = Trajectory.build(opened, turns, end or _so_far(opened, turns))
        explained: list[ExplainedSample] = []
        problem = ""
        try:
            explained = explain(judgement, trajectory)
        except RecordError as error:
            problem = str(error)
        return cls(
            judgement=judgement,
            trajectory=trajectory,
            ended=end is not None,
            explained=explained,
            problem=problem,
        )

    @property
    def forks(self) -> dict[str, Fork]:
        """Of each turn: why it stands where it stands."""
        return causes(self.trajectory)

    @property
    def turn_causes(self) -> dict[str, Span]:
        return turn_causes(self.judgement, self.trajectory, self.explained)


def _so_far(opened: OpenRecord, turns: Sequence[TurnRecord]) -> EndRecord:
    """A tree needs an end: where a rollout has none yet, it is as if it were lost now."""
    return EndRecord.without_process(opened.rollout_id, Outcome.LOST, num_turns=len(turns))


def inspected_json(found: Inspected, decoder: Decoder, *, tokens: bool) -> dict[str, Any]:
    whys, trajectory, forks = found.turn_causes, found.trajectory, found.forks
    end = trajectory.end
    row: dict[str, Any] = as_json(found.judgement)
    if found.ended:
        row |= {name: getattr(end, name) for name in ("traceback", "stdout_tail", "stderr_tail")}
        used = ("cpu_s", "max_rss_bytes", "peak_memory_bytes", "written_bytes")
        row |= {name: getattr(end, name) for name in ("num_rejected_calls", *used)}
    row["unanswered"] = list(found.judgement.rollout.unanswered)
    row["turns"] = [
        {
            "turn_id": turn.turn_id,
            "parent_turn_id": turn.parent_turn_id,
            "fork": str(forks[turn.turn_id]),
            "finish_reason": turn.finish_reason,
            "num_prompt_tokens": turn.num_prompt_tokens,
            "num_context_tokens": len(turn.context_token_ids),
            "num_sampled_tokens": len(turn.token_ids),
            "versions": sorted(set(turn.versions.tolist())),
            "reward": end.turn_rewards.get(turn.turn_id),
            "why": whys[turn.turn_id].why if turn.turn_id in whys else None,
            "advantage": whys[turn.turn_id].advantage if turn.turn_id in whys else None,
            "context": decoder.text(turn.context_token_ids),
            "sampled": decoder.text(turn.token_ids),
            "started_at": turn.started_at,
            "ended_at": turn.ended_at,
        }
        for turn in trajectory.turns.values()
    ]
    if tokens:
        row["samples"] = [
            [_token_json(each, span, i, decoder) for span in each.spans for i in _positions(span)]
            for each in found.explained
        ]
        row["problem"] = found.problem
    return row


def _token_json(
    each: ExplainedSample, span: Span, position: int, decoder: Decoder
) -> dict[str, Any]:
    sample = each.sample
    is_own = span.why not in ("context", "shared")
    return {
        "position": position,
        "turn_id": span.turn_id,
        "token_id": int(sample.token_ids[position]),
        "text": decoder.text(sample.token_ids[position : position + 1]),
        "trained": span.why == TRAINED,
        "why": span.why,
        "version": int(sample.versions[position]) if is_own else None,
        "logprob": float(sample.rollout_logprobs[position]) if is_own else None,
        "advantage": span.advantage,
    }


def _positions(span: Span) -> range:
    return range(span.start, span.end)


def say_rollout(console: Console, found: Inspected, decoder: Decoder, *, tokens: bool) -> None:
    numbers = {turn_id: i for i, turn_id in enumerate(found.trajectory.turns, 1)}
    _say_facts(console, found)
    if found.problem:
        _say(console, f"no training samples: {one_line(found.problem)}", "bold red")
    if not numbers:
        _say(console, "\nIt made no model call.", "dim")
        return
    _say(console, "\nTurns", "bold")
    console.print(_tree(found, numbers), soft_wrap=True)
    if not decoder.is_there:
        _say(console, "\nNo tokenizer is at hand: tokens are shown as numbers.", "yellow")
    if tokens:
        _say_tokens(console, found, numbers, decoder)
    else:
        _say_transcript(console, found, numbers, decoder)
    _say_output(console, found)


def _say(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style=style), soft_wrap=True)


def _say_facts(console: Console, found: Inspected) -> None:
    judgement = found.judgement
    row = as_json(judgement)
    outcome = row["outcome"] or "none yet"
    step = f" in step {row['step']}" if row["step"] else ""
    reward = "none" if row["reward"] is None else f"{row['reward']:g}"
    reason = reason_of(judgement)
    facts = [
        ("rollout", f"{row['rollout_id']} of group {row['group_id']}, attempt {row['attempt']}"),
        ("task", f"{row['task_id']} ({row['split']})"),
        *([("agent", row["agent"])] if row["agent"] else []),
        ("outcome", outcome + (f": {reason}" if reason and outcome != "completed" else "")),
        ("fate", f"{row['fate']}{step}: {FATES[judgement.fate]}"),
        ("reward", reward),
        ("tokens", f"{row['num_sampled_tokens']} sampled, {row['num_trained_tokens']} trained"),
    ]
    if judgement.reason and outcome == "completed":
        facts.insert(4, ("", reason))
    if unanswered := judgement.rollout.unanswered:
        facts.append(
            ("unanswered", f"{', '.join(unanswered)}: asked of the engine, and no token came")
        )
    if row["staleness"] is not None:
        facts.append(("staleness", str(row["staleness"])))
    if row["wall_s"] is not None:
        end = found.trajectory.end
        refused = f", {end.num_rejected_calls} calls refused" if end.num_rejected_calls else ""
        facts.append(("took", f"{row['wall_s']:.2f} s, {_used(end)}{refused}"))
    for name, value in facts:
        _say(console, f"{name:10} {one_line(value)}")


def _used(end: EndRecord) -> str:
    largest, peak, written = (
        f"{num_bytes / 2**20:.1f} MiB"
        for num_bytes in (end.max_rss_bytes, end.peak_memory_bytes, end.written_bytes)
    )
    memory = f"{peak} of memory at most" if end.peak_memory_bytes else f"{largest} in a process"
    return f"{end.cpu_s:.2f} s of CPU, {memory}, {written} of files"


def _tree(found: Inspected, numbers: dict[str, int]) -> Tree:
    trajectory, whys, forks = found.trajectory, found.turn_causes, found.forks
    root = Tree(Text(f"rollout {one_line(trajectory.open.rollout_id)}"))
    nodes: dict[str | None, Tree] = {None: root}
    for turn in trajectory.turns.values():  # parents come first
        span = whys.get(turn.turn_id)
        nodes[turn.turn_id] = nodes[turn.parent_turn_id].add(
            Text.assemble(
                (f"{numbers[turn.turn_id]}  ", "bold"),
                f"{forks[turn.turn_id]}  {len(turn.context_token_ids)} + {len(turn.token_ids)} "
                f"tokens, {one_line(turn.finish_reason)}, {_versions(turn.versions)}  ",
                _why(span),
            )
        )
    return root


def _versions(versions: Int32Array) -> str:
    if not len(versions):
        return "no version"
    low, high = int(versions.min()), int(versions.max())
    return f"version {low}" if low == high else f"versions {low} to {high}"


def _why(span: Span | None) -> Text:
    if span is None:
        return Text("not in a sample", style="dim")
    advantage = "" if span.advantage is None else f", advantage {span.advantage:+.3f}"
    if span.why == TRAINED:
        return Text(f"trained{advantage}", style="green")
    return Text(f"masked: {span.why}{advantage}", style="yellow")


def _shown(token_ids: Int32Array, decoder: Decoder) -> str:
    text = decoder.text(token_ids)
    return " ".join(map(str, token_ids.tolist())) if text is None else escaped(text)


def _say_transcript(
    console: Console, found: Inspected, numbers: dict[str, int], decoder: Decoder
) -> None:
    forks = found.forks
    for turn in found.trajectory.turns.values():
        parent = turn.parent_turn_id
        after = f" after turn {numbers[parent]}" if parent is not None else ""
        reward = found.trajectory.end.turn_rewards.get(turn.turn_id)
        rewarded = "" if reward is None else f", reward {reward:g}"
        _say(
            console,
            f"\n── turn {numbers[turn.turn_id]}{after}, {forks[turn.turn_id]}{rewarded}",
            "bold",
        )
        _say(console, f"   {one_line(turn.turn_id)}", "dim")
        _say(console, _shown(turn.context_token_ids, decoder), "dim")
        _say(console, _shown(turn.token_ids, decoder), "green")


def _say_tokens(
    console: Console, found: Inspected, numbers: dict[str, int], decoder: Decoder
) -> None:
    for number, each in enumerate(found.explained, 1):
        sample = each.sample
        _say(console, f"\n── training sample {number}: {len(sample.token_ids)} tokens", "bold")
        for span in each.spans:
            meaning = CAUSES.get(span.why, "")
            title = Text.assemble((f"turn {numbers[span.turn_id]}: ", "bold"), _why(span))
            if meaning:
                title.append(f"  ({meaning})", "dim")
            console.print(title, soft_wrap=True)
            for i in _positions(span):
                console.print(_token_line(each, span, i, decoder), soft_wrap=True)


def _token_line(each: ExplainedSample, span: Span, position: int, decoder: Decoder) -> Text:
    sample = each.sample
    text = decoder.text(sample.token_ids[position : position + 1])
    parts = [f"{position:6d} {int(sample.token_ids[position]):7d}"]
    parts.append(f"{'' if text is None else _quoted(text):24}")
    parts.append(TRAINED if span.why == TRAINED else f"masked: {span.why}")
    if span.why not in ("context", "shared"):
        parts.append(f"logprob {float(sample.rollout_logprobs[position]):.3f}")
        parts.append(f"version {int(sample.versions[position])}")
    return Text("  ".join(parts), style="green" if span.why == TRAINED else "dim")


def _quoted(text: str) -> str:
    """In quotes, on one line, so that white space shows."""
    return f"'{one_line(text)}'"


def _say_output(console: Console, found: Inspected) -> None:
    if not found.ended:
        return
    end = found.trajectory.end
    outputs = (("traceback", end.traceback), ("stdout", end.stdout_tail))
    for name, text in (*outputs, ("stderr", end.stderr_tail)):
        if text.strip():
            _say(console, f"\n── {name}", "bold")
            _say(console, escaped(text.rstrip()))
