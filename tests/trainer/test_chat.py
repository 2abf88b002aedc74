"""What `areal-sub chat` shows of an agent's conversation is text, whatever is in it."""

from __future__ import annotations

import io

from rich.console import Console

from areal_sub.records import EndRecord, Fork, OpenRecord, Outcome, TurnRecord, float32, int32
from areal_sub.trainer.chat import _show
from areal_sub.trajectory.tree import Trajectory


def test_a_terminal_is_told_nothing_by_agents_and_models() -> None:
    opened = OpenRecord(
        rollout_id="r", group_id="g", task_id="t", split="valid", policy_version=0, opened_at=0.0
    )
    turn = TurnRecord(
        rollout_id="r",
        turn_id="a",
        parent_turn_id=None,
        fork=Fork.ROOT,
        context_token_ids=int32([1]),
        token_ids=int32([2]),
        rollout_logprobs=float32([-0.5]),
        versions=int32([0]),
        finish_reason="stop",
        dialect="chat",
        model="m",
        temperature=1.0,
        top_p=1.0,
        started_at=0.0,
        ended_at=0.0,
        num_prompt_tokens=1,
        engine_digest=0,
    )
    end = EndRecord.without_process("r", Outcome.EXITED, num_turns=1, error="\x1b[2J")
    shown = io.StringIO()
    _show(
        Trajectory.build(opened, [turn], end),
        lambda ids: f"said {ids} \x1b]0;title\x07\u202e",
        Console(file=shown, highlight=False, color_system=None, width=200),
    )
    text = shown.getvalue()
    assert r"said [1] \x1b]0;title\x07\u202e" in text
    assert "said [2]" in text
    assert text.endswith("[exited] \\x1b[2J\n\n")
    assert "\x1b" not in text
