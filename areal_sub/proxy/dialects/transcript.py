"""A conversation that arrives in pieces (items, blocks, parts), put together as messages.

What an assistant thinks, says and calls in one go is one message, however many pieces it came in;
it is the message that was sampled, so that the history matches.
"""

from __future__ import annotations

from dataclasses import replace

from areal_sub.proxy.dialects import fields
from areal_sub.proxy.neutral import Message, ToolCall
from areal_sub.proxy.refusals import invalid


class Transcript:
    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._said = Message("assistant")  # so far, of the message that `_is_open`
        self._is_open = False

    def messages(self) -> tuple[Message, ...]:
        self.close()
        return tuple(self._messages)

    def add(self, message: Message) -> None:
        self.close()
        self._messages.append(message)

    def think(self, text: str) -> None:
        if self._said.content or self._said.tool_calls:
            self.close()
        self._open(replace(self._said, reasoning=self._said.reasoning + text))

    def say(self, text: str) -> None:
        self._open(replace(self._said, content=self._said.content + text))

    def call(self, call: ToolCall, where: str) -> None:
        if len(self._said.tool_calls) >= fields.MAX_TOOL_CALLS:
            raise invalid(f"{where}: more than {fields.MAX_TOOL_CALLS} calls in one go.", where)
        self._open(replace(self._said, tool_calls=(*self._said.tool_calls, call)))

    def close(self) -> None:
        """What the assistant says next is another message."""
        if self._is_open:
            self._messages.append(self._said)
        self._said, self._is_open = Message("assistant"), False

    def _open(self, said: Message) -> None:
        self._said, self._is_open = said, True
