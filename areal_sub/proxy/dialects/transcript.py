"""A conversation that arrives in pieces (items, blocks, parts), put together as messages.

What an assistant thinks, says and calls in one go is one message, however many pieces it came in;
it is the message that was sampled, so that the history matches. Each dialect has its own, which
reads the dialect's items (`seen.Reader`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from areal_sub.proxy.dialects import fields
from areal_sub.proxy.neutral import Message, ToolCall
from areal_sub.proxy.refusals import invalid


class Transcript(ABC):
    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.state: Any = None
        self.is_open = False  # the assistant's message, which consists so far of:
        self._thoughts: list[str] = []
        self._texts: list[str] = []
        self._calls: list[ToolCall] = []

    @abstractmethod
    def read(self, item: Any, index: int) -> None:
        """Raises `Refusal`."""

    def add(self, message: Message) -> None:
        self.close()
        self.messages.append(message)

    def think(self, text: str) -> None:
        if self._calls or self._texts:
            self.close()
        self.is_open = True
        self._thoughts.append(text)

    def say(self, text: str) -> None:
        self.is_open = True
        if text:
            self._texts.append(text)

    def call(self, call: ToolCall, where: str) -> None:
        if len(self._calls) >= fields.MAX_TOOL_CALLS:
            raise invalid(f"{where}: more than {fields.MAX_TOOL_CALLS} calls in one go.", where)
        self.is_open = True
        self._calls.append(call)

    def close(self) -> None:
        """What the assistant says next is another message."""
        if not self.is_open:
            return
        said = Message(
            "assistant",
            "".join(self._texts),
            tuple(self._calls),
            reasoning="".join(self._thoughts),
        )
        self.messages.append(said)
        self._thoughts, self._texts, self._calls = [], [], []
        self.is_open = False
