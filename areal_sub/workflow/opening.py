"""A task's messages for frameworks whose agents take a system prompt and one question. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def opening(messages: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """(system prompt or "", question). Several of one role are joined by an empty line.

    Raises `ValueError` where there are others than the system's and the user's: such a framework
    has no way to begin in the middle of a conversation.
    """
    others = sorted({str(each["role"]) for each in messages} - {"system", "user"})
    if others:
        raise ValueError(
            f"the task has messages of: {', '.join(others)}; this framework's agents begin with a "
            "system prompt and the user's question (the ready agents on an SDK alone take any)"
        )
    system, question = (
        "\n\n".join(each["content"] for each in messages if each["role"] == role)
        for role in ("system", "user")
    )
    return system, question
