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
import sys
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from areal_sub.errors import ArealSubError
from areal_sub.proxy.families import AUTO, END_OF_TURN, FORMATS, AnswerFormat, choose
from areal_sub.proxy.history import message_hash
from areal_sub.proxy.neutral import Choice, Message, ToolCall
from areal_sub.proxy.parsers import ParsedCall
from areal_sub.proxy.recent import Recent
from areal_sub.proxy.template import ChatTemplate, RenderError, load_chat_template
from areal_sub.proxy.vocabulary import Vocabulary, any_of

log = logging.getLogger(__name__)

Tools = Sequence[Mapping[str, Any]]

# Enough of a prompt to hold a tag, or a header, that begins the answer.
NUM_END_CHARS = 256

_LETTERS_AND_DIGITS = string.ascii_letters + string.digits
_SHORT_CALL_ID = re.compile("[a-zA-Z0-9]{9}")


class TextTooLong(ArealSubError):
    """The rendered text has more than `max_chars`."""

    def __init__(self, num_chars: int) -> None:
        super().__init__(f"{num_chars} characters")
        self.num_chars = num_chars


class Renderer:
    def __init__(
        self,
        vocabulary: Vocabulary,
        template: ChatTemplate,
        answer_format: AnswerFormat = FORMATS["hermes"],
    ) -> None:
        self.vocabulary = vocabulary
        self.template = template
        self.max_chars = sys.maxsize
        """What is longer is not tokenized: its tokens could not be as few as the model takes."""
        self.format = answer_format
        self.recent = Recent(template.literals)
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
        """Ids of the whole prompt, up to where the assistant speaks. Raises `RenderError`,
        `TextTooLong`."""
        shield = _Shield(self)
        text = shield.render(shield.messages(messages), shield.tools(tools), True)
        return self.vocabulary.encode(text, shield.reveal)

    def continuation(
        self,
        messages: Sequence[Message],
        tools: Tools,
        num_history: int,
        last_id: int | None,
        sorts: Sequence[int] | None = None,
    ) -> list[int] | None:
        """Ids that follow a turn's sampled tokens. `last_id`: the last of those (None: no tokens).

        `messages[num_history - 1]` is the turn's answer, those before it were its prompt. None
        where the template does not render the longer conversation as an extension of the shorter.
        `sorts`, of each message what `recent.sort` says, lets it take less time than the length of
        the conversation asks for. Raises `RenderError`, `TextTooLong`.
        """
        stand_in = None
        if sorts is not None:
            stand_in = self.recent.stand_in(messages, sorts, num_history, bool(tools))
        if stand_in is None or (known := self.recent.is_shown(stand_in.kind)) is False:
            return self._continuation(messages, tools, num_history, last_id)
        kept = [messages[index] for index in stand_in.indices]
        num_kept = num_history - (len(messages) - len(kept))
        try:
            ids = self._continuation(kept, tools, num_kept, last_id)
        except RenderError:
            ids = None  # a template may insist on an order that the stand-in does not keep
        if known and ids is not None:
            return ids
        whole = self._continuation(messages, tools, num_history, last_id)
        self.recent.note(stand_in.kind, ids is not None and ids == whole)
        return whole

    def _continuation(
        self, messages: Sequence[Message], tools: Tools, num_history: int, last_id: int | None
    ) -> list[int] | None:
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
            found = self._answer_in(whole, asked, shield, tools)
            if found is None or message_hash(found[0]) != message_hash(messages[num_history - 1]):
                return None
            end_of_turn = found[1]
        has_end = end_of_turn >= 0
        text = whole[end_of_turn:] if has_end else whole[len(history) :]
        ids = self.vocabulary.encode(text, shield.reveal)
        # The sampled tokens normally end with the end of turn that this text begins with. Where
        # the template writes none, the next role's header may be what ended the turn.
        sampled_end = last_id in self.vocabulary.stop_ids
        if sampled_end and (has_end or ids[:1] == [last_id]):
            return ids[1:]
        return ids

    def read_back(
        self, messages: Sequence[Message], tools: Tools, num_history: int
    ) -> Message | None:
        """What answer `messages[num_history - 1]` is by what the template shows of it in the longer
        conversation; None where that does not continue the answer's prompt. Raises `RenderError`.
        """
        shield = _Shield(self)
        shown, shown_tools = shield.messages(messages), shield.tools(tools)
        whole = shield.render(shown, shown_tools, True)
        asked = shield.render(shown[: num_history - 1], shown_tools, True)
        found = self._answer_in(whole, asked, shield, tools)
        return found[0] if found is not None else None

    def _answer_in(
        self, whole: str, asked: str, shield: _Shield, tools: Tools
    ) -> tuple[Message, int] | None:
        """The answer to prompt `asked` that `whole` shows, and where in `whole` its turn ends."""
        if not whole.startswith(asked):
            return None
        ends = [whole.find(text, len(asked)) for text in self.vocabulary.stop_texts]
        end = min((index for index in ends if index >= 0), default=None)
        if end is None:
            return None
        # A parser sees the end of the turn where it is one of its tags.
        seen = next((tag for tag in self.format.tags if whole.startswith(tag, end)), "")
        parser = self.format.parser(tools, shield.reveal(asked[-NUM_END_CHARS:]))
        answer = Choice()
        for piece in [
            *parser.feed(shield.reveal(whole[len(asked) : end] + seen)),
            *parser.finish(),
        ]:
            if isinstance(piece, ParsedCall):
                answer.append(ToolCall(piece.id, piece.name, piece.arguments))
            else:
                answer.append(piece)
        return answer.message(), end

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
        renderer = self._renderer
        try:
            text = renderer.template.render(messages, tools, add_generation_prompt=generate)
        except RenderError as error:
            raise RenderError(self.reveal(str(error))) from None
        if len(text) > renderer.max_chars and len(self.reveal(text)) > renderer.max_chars:
            raise TextTooLong(len(text))
        return text

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
            self._add_reasoning(shown, self._any(message.reasoning))
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
