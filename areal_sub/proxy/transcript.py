"""What was said in a rollout, kept for its grader: messages as the model saw and said them.

Kept as a tree, as the tokens are: of each prompt only the messages that its parent turn does not
stand for. What the policy sampled is kept apart from what the agent says that it sampled, so that
nobody can put words into its mouth. Bounded: a call beyond `MAX_CHARS` is refused before it is
sampled. Called by `turns.py`; `control.py` hands it to the trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from areal_sub.proxy.history import Prompt, Turn
from areal_sub.proxy.neutral import Message
from areal_sub.proxy.refusals import Reason, Refusal

MAX_CHARS = 16 * 2**20
MESSAGE_CHARS = 64
"""What a message counts at least: an empty one takes memory, too."""


class Transcript:
    def __init__(self) -> None:
        self._prompts: dict[Prompt, int] = {}  # → its place in `_asked`
        self._num_messages: dict[Prompt, int] = {}  # of the whole prompt
        self._asked: list[dict[str, Any]] = []
        self._turns: list[dict[str, Any]] = []
        self._num_chars = 0

    def ask(self, prompt: Prompt, messages: Sequence[Message]) -> None:
        """`prompt` was made from `messages`. Raises `Refusal` where there is no more room."""
        if prompt in self._prompts:
            return
        parent = prompt.parent
        known = self._num_messages[parent.prompt] + 1 if parent else 0
        new = messages[known:]
        num_chars = self._num_chars + sum(_num_chars(message) for message in new)
        if num_chars > MAX_CHARS:
            raise Refusal(
                Reason.TOO_LARGE,
                f"The messages of this rollout have more than {MAX_CHARS} characters together.",
                param="messages",
            )
        self._num_chars = num_chars
        self._prompts[prompt] = len(self._asked)
        self._num_messages[prompt] = len(messages)
        self._asked.append(
            {
                "parent_turn_id": parent.turn_id if parent else None,
                "messages": [plain(message) for message in new],
            }
        )

    def add(self, turn: Turn, answer: Message, finish_reason: str, *, constrained: bool) -> None:
        """`constrained`: the agent's call said what the answer has to look like, maybe word by
        word."""
        self._num_chars += _num_chars(answer)
        said = {**plain(answer), "turn_id": turn.turn_id, "finish_reason": finish_reason}
        if constrained:
            said["constrained"] = True
        self._turns.append({"prompt": self._prompts[turn.prompt], "message": said})

    def to_map(self) -> dict[str, Any]:
        """{"prompts": [{"parent_turn_id", "messages"}], "turns": [{"prompt": index, "message"}]};
        turns in the order of recording."""
        return {"prompts": self._asked, "turns": self._turns}


def plain(message: Message) -> dict[str, Any]:
    """In the form of OpenAI's chat messages."""
    shown: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        shown["reasoning_content"] = message.reasoning
    if message.tool_calls:
        shown["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        shown["tool_call_id"] = message.tool_call_id
    if message.name:
        shown["name"] = message.name
    return shown


def _num_chars(message: Message) -> int:
    ids = len(message.tool_call_id) + len(message.name)
    calls = sum(
        MESSAGE_CHARS + len(call.id) + len(call.name) + len(call.arguments)
        for call in message.tool_calls
    )
    return MESSAGE_CHARS + len(message.content) + len(message.reasoning) + ids + calls
