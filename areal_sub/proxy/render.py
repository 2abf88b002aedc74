"""Messages to tokens, exactly.

Two operations. `prompt`: the whole prompt of a conversation. `continuation`: what has to follow a
turn's sampled tokens so that the conversation goes on. So sampled tokens are never rendered and
tokenized again, where templates drop separators, strip thinking and reformat calls.

Text that comes from messages and tools never becomes a control token: before rendering, whatever
looks like one is hidden behind a random placeholder; after rendering, the control tokens in the
text are the template's own, and the hidden text is put back into the ordinary text between them.
What an assistant says may show what models themselves write (`<think>`, calls); templates look for
it there.

Pure, but for the random placeholders. Called by `turns.py`.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from areal_sub.proxy.neutral import Message
from areal_sub.proxy.template import ChatTemplate, RenderError, load_chat_template
from areal_sub.proxy.vocabulary import Vocabulary, any_of

log = logging.getLogger(__name__)

Tools = Sequence[dict[str, Any]]


class Renderer:
    def __init__(
        self, vocabulary: Vocabulary, template: ChatTemplate, visible: Collection[str] = ()
    ) -> None:
        """`visible`: special tokens that models write as text (the tool-call parser's tags)."""
        self.vocabulary = vocabulary
        self.template = template
        hidden = (vocabulary.special_texts - set(visible)).union(vocabulary.stop_texts)
        self.not_text = any_of(vocabulary.control_ids)
        self.not_text_of_assistant = any_of(hidden)
        self._warn_where_unusual()

    @classmethod
    def load(
        cls, folder: Path, chat_template: Path | None = None, visible: Collection[str] = ()
    ) -> Renderer:
        """From a model folder. Raises `ModelError`."""
        return cls(Vocabulary(folder), load_chat_template(folder, chat_template), visible)

    def prompt(self, messages: Sequence[Message], tools: Tools) -> list[int]:
        """Ids of the whole prompt, up to where the assistant speaks. Raises `RenderError`."""
        shield = _Shield(self)
        text = shield.render(shield.messages(messages), shield.tools(tools), True)
        return self.vocabulary.encode(text, shield.reveal)

    def continuation(
        self, messages: Sequence[Message], tools: Tools, num_history: int, last_id: int | None
    ) -> list[int] | None:
        """Ids that follow a turn's sampled tokens. `last_id`: the last of those (None: no tokens).

        `messages[num_history - 1]` is the turn's answer, those before it were its prompt. None
        where the template does not render the longer conversation as an extension of the shorter.
        Raises `RenderError`.
        """
        shield = _Shield(self)
        shown, shown_tools = shield.messages(messages), shield.tools(tools)
        whole = shield.render(shown, shown_tools, True)
        try:
            before = shield.render(shown[: num_history - 1], shown_tools, False)
            history = shield.render(shown[:num_history], shown_tools, False)
        except RenderError:
            return None
        if not (history.startswith(before) and whole.startswith(history)):
            return None
        stop_texts = self.vocabulary.stop_texts
        end_of_turn = max((history.rfind(t, len(before)) for t in stop_texts), default=-1)
        has_end = end_of_turn >= 0
        text = whole[end_of_turn:] if has_end else whole[len(history) :]
        ids = self.vocabulary.encode(text, shield.reveal)
        # The sampled tokens normally end with the end of turn that this text begins with. Where
        # the template writes none, the next role's header may be what ended the turn.
        sampled_end = last_id in self.vocabulary.stop_ids
        if sampled_end and (has_end or ids[:1] == [last_id]):
            return ids[1:]
        return ids

    def _warn_where_unusual(self) -> None:
        """Compare a plain conversation with the tokenizer's own encoding of its text."""
        messages = [
            {"role": r, "content": f"Some {r} text."} for r in ("user", "assistant", "user")
        ]
        try:
            text = self.template.render(messages, None, add_generation_prompt=True)
        except RenderError as error:
            log.warning("the chat template fails on a plain conversation: %s", error)
            return
        expected = self.vocabulary.full.encode(text, add_special_tokens=False).ids
        if self.vocabulary.encode(text) != expected:
            log.warning(
                "prompts are tokenized between control tokens, which for this tokenizer differs "
                "from tokenizing the text as a whole; trained tokens are exact all the same"
            )


class _Shield:
    """Hides, for one rendering, what only looks like control tokens, behind an unguessable mark."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._mark = secrets.token_hex(8)
        self._hidden: list[str] = []

    def messages(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """In the form that chat templates read."""
        return [self._message(message) for message in messages]

    def tools(self, tools: Tools) -> list[dict[str, Any]] | None:
        return [self._any(tool) for tool in tools] or None

    def render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, generate: bool
    ) -> str:
        try:
            return self._renderer.template.render(messages, tools, add_generation_prompt=generate)
        except RenderError as error:
            raise RenderError(self.reveal(str(error))) from None

    def reveal(self, text: str) -> str:
        if self._mark not in text:
            return text
        return re.sub(f"{self._mark}-([0-9]+)-", lambda m: self._hidden[int(m[1])], text)

    def _message(self, message: Message) -> dict[str, Any]:
        renderer = self._renderer
        is_assistant = message.role == "assistant"
        pattern = renderer.not_text_of_assistant if is_assistant else renderer.not_text
        shown: dict[str, Any] = {
            "role": message.role,
            "content": self._text(message.content, pattern),
        }
        if message.tool_calls:
            shown["tool_calls"] = [
                {
                    "id": self._any(call.id),
                    "type": "function",
                    "function": {
                        "name": self._any(call.name),
                        "arguments": self._any(call.parsed_arguments()),
                    },
                }
                for call in message.tool_calls
            ]
        if message.reasoning:
            shown["reasoning_content"] = self._text(message.reasoning, pattern)
        if message.tool_call_id:
            shown["tool_call_id"] = self._any(message.tool_call_id)
        if message.name:
            shown["name"] = self._any(message.name)
        return shown

    def _any(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._text(value, self._renderer.not_text)
        if isinstance(value, dict):
            return {self._any(key): self._any(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._any(item) for item in value]
        return value

    def _text(self, text: str, pattern: re.Pattern[str] | None) -> str:
        return pattern.sub(self._hide, text) if pattern is not None else text

    def _hide(self, match: re.Match[str]) -> str:
        self._hidden.append(match[0])
        return f"{self._mark}-{len(self._hidden) - 1}-"
