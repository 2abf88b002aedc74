"""What a framework's agent begins with."""

from __future__ import annotations

import pytest

from areal_sub.workflow.opening import opening


def said(*messages: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]


def test_a_system_prompt_and_a_question() -> None:
    assert opening(said(("user", "q"))) == ("", "q")
    messages = said(("system", "a"), ("user", "q"), ("system", "b"), ("user", "r"))
    assert opening(messages) == ("a\n\nb", "q\n\nr")


def test_a_conversation_that_has_begun_is_refused() -> None:
    with pytest.raises(ValueError, match="messages of: assistant, tool;"):
        opening(said(("user", "q"), ("tool", "t"), ("assistant", "a")))
