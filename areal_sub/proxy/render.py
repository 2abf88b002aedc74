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
import string
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from areal_sub.proxy.families import AUTO, END_OF_TURN, FORMATS, AnswerFormat, choose
from areal_sub.proxy.history import message_hash
from areal_sub.proxy.neutral import Choice, Message, ToolCall
from areal_sub.proxy.parsers import ParsedCall
from areal_sub.proxy.template import ChatTemplate, RenderError, load_chat_template
from areal_sub.proxy.vocabulary import Vocabulary, any_of

log = logging.getLogger(__name__)

Tools = Sequence[Mapping[str, Any]]

# Enough of a prompt to hold a tag, or a header, that begins the answer.
NUM_END_CHARS = 256

_LETTERS_AND_DIGITS = string.ascii_letters + string.digits
_SHORT_CALL_ID = re.compile("[a-zA-Z0-9]{9}")


class Renderer:
    def __init__(
        self,
        vocabulary: Vocabulary,
        template: ChatTemplate,
        answer_format: AnswerFormat = FORMATS["hermes"],
    ) -> None:
        self.vocabulary = vocabulary
        self.template = template
        self.format = answer_format
        echoed = set(answer_format.echoed)
        hidden = (vocabulary.special_texts - echoed).union(vocabulary.stop_texts)
        self.not_text = any_of(vocabulary.control_ids)
        self.not_text_of_assistant = any_of(hidden)
        self._warn_where_unusual()

    @classmethod
    def load(
        cls,
        folder: Path,
        chat_template: Path | None = None,
        tool_call_parser: str = AUTO,
        reasoning_parser: str = "none",
    ) -> Renderer:
        """From a model folder; the parsers by the names of `families`. Raises `ModelError` and
        `ConfigError`."""
        vocabulary = Vocabulary(folder)
        template = load_chat_template(folder, chat_template)
        answer_format = choose(tool_call_parser, reasoning_parser, template.source)
        vocabulary.add_stops(
            vocabulary.control_ids[text]
            for text in END_OF_TURN
            if text in vocabulary.control_ids and text in template.source
        )
        return cls(vocabulary, template, answer_format)

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
        stop_texts = self.vocabulary.stop_texts
        if history.startswith(before) and whole.startswith(history):
            end_of_turn = max((history.rfind(t, len(before)) for t in stop_texts), default=-1)
        else:
            # Some templates write a last answer in a way of its own.
            asked = shield.render(shown[: num_history - 1], shown_tools, True)
            end_of_turn = self._end_of_answer(whole, asked)
            if end_of_turn < 0:
                return None
            said = shield.reveal(whole[len(asked) : end_of_turn])
            prompt_end = shield.reveal(asked[-NUM_END_CHARS:])
            if not self._says(said, prompt_end, messages[num_history - 1], tools):
                return None
        has_end = end_of_turn >= 0
        text = whole[end_of_turn:] if has_end else whole[len(history) :]
        ids = self.vocabulary.encode(text, shield.reveal)
        # The sampled tokens normally end with the end of turn that this text begins with. Where
        # the template writes none, the next role's header may be what ended the turn.
        sampled_end = last_id in self.vocabulary.stop_ids
        if sampled_end and (has_end or ids[:1] == [last_id]):
            return ids[1:]
        return ids

    def _end_of_answer(self, whole: str, asked: str) -> int:
        """Where the answer to prompt `asked` ends in `whole`; -1 where it does not continue it."""
        if not whole.startswith(asked):
            return -1
        found = [whole.find(text, len(asked)) for text in self.vocabulary.stop_texts]
        return min((index for index in found if index >= 0), default=-1)

    def _says(self, said: str, prompt_end: str, message: Message, tools: Tools) -> bool:
        """Whether text `said` is how the model would have written `message`."""
        parser = self.format.parser(tools, prompt_end)
        answer = Choice()
        for piece in [*parser.feed(said), *parser.finish()]:
            if isinstance(piece, ParsedCall):
                answer.append(ToolCall(piece.id, piece.name, piece.arguments))
            else:
                answer.append(piece)
        return message_hash(answer.message()) == message_hash(message)

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
                    "id": self._call_id(call.id),
                    "type": "function",
                    "function": {
                        "name": self._any(call.name),
                        "arguments": self._any(call.parsed_arguments()),
                    },
                }
                for call in message.tool_calls
            ]
        if message.reasoning:
            self._add_reasoning(shown, self._text(message.reasoning, pattern))
        if message.tool_call_id:
            shown["tool_call_id"] = self._call_id(message.tool_call_id)
        if message.name:
            shown["name"] = self._any(message.name)
        return shown

    def _add_reasoning(self, shown: dict[str, Any], reasoning: str) -> None:
        answer_format, content = self._renderer.format, shown["content"]
        if answer_format.reasoning_in == "blocks":
            blocks = [{"type": "thinking", "thinking": reasoning}]
            shown["content"] = blocks + ([{"type": "text", "text": content}] if content else [])
        elif answer_format.reasoning_in == "thinking":
            if "tool_calls" in shown and content:
                # What was said before a call is nearly thinking; the template takes only one.
                shown["content"], reasoning = "", f"{reasoning}\n\n{content}"
            shown["thinking"] = reasoning
        else:
            shown["reasoning_content"] = reasoning

    def _call_id(self, call_id: str) -> Any:
        if not self._renderer.format.short_call_ids or _SHORT_CALL_ID.fullmatch(call_id):
            return self._any(call_id)
        number = int.from_bytes(blake2b(call_id.encode(), digest_size=8).digest())
        short = ""
        for _ in range(9):
            number, digit = divmod(number, len(_LETTERS_AND_DIGITS))
            short += _LETTERS_AND_DIGITS[digit]
        return short

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
