"""What `areal-sub chat` shows of an agent's conversation is text, whatever is in it."""

from __future__ import annotations

import io

from rich.console import Console
from rollouts import trajectory, turn

from areal_sub.records import Outcome
from areal_sub.trainer.chat import _show


def test_a_terminal_is_told_nothing_by_agents_and_models() -> None:
    shown = io.StringIO()
    _show(
        trajectory([turn("a", None, [1], [2])], outcome=Outcome.EXITED, error="\x1b[2J"),
        lambda ids: f"said {ids} \x1b]0;title\x07\u202e",
        Console(file=shown, highlight=False, color_system=None, width=200),
    )
    text = shown.getvalue()
    assert r"said [1] \x1b]0;title\x07\u202e" in text
    assert "said [2]" in text
    assert text.endswith("[exited] \\x1b[2J\n\n")
    assert "\x1b" not in text
