"""How little of a conversation has to be rendered to know how it goes on.

What a template writes behind an answer hardly ever depends on all that came before. So `Renderer`
renders a stand-in, the conversation without its middle: its beginning, the last user's message, the
exchange before the answer, the answer and what is new. That this says the same as the whole
conversation is shown, not assumed: once for each *kind* of conversation the whole is rendered too,
and compared. What templates can tell conversations apart by is part of the kind: whether there are
tools, each message of the stand-in, which sorts of messages were left out before and behind the
last user's, whether their number is odd, and how large it is, in powers of two. The sort of a
message is its role, which fields it has, and which texts that the template itself names (`</think>`
and the like) stand in it. A kind for which the two differed once is always rendered whole.

Owns `Recent`: the kinds and what was shown of them, bounded, for all rollouts of a proxy. It keeps
no text of any message. `sort` is called on the event loop only, the rest on any thread.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

from areal_sub.proxy.neutral import Message

# Fewer messages left out are not worth a proof.
MIN_LEFT_OUT = 6
MAX_SORTS = 4096
MAX_KINDS = 16_384
MAX_KIND = 128
"""Sorts in one kind; conversations of more than that are no two alike."""

Kind = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class StandIn:
    indices: tuple[int, ...]  # of the messages that are kept, in order
    kind: Kind


@dataclass(slots=True)
class Recent:
    literals: Collection[str]  # texts that the template names
    # The one that was asked for last is the last.
    _sorts: dict[tuple[object, ...], int] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=count)
    _shown: dict[Kind, bool] = field(default_factory=dict)  # kind → whether the two were the same

    def sort(self, message: Message) -> int:
        """A number for what templates can tell of a message; of what was asked for long ago, a new
        one, and none ever means anything else."""
        texts = [message.content, message.reasoning]
        for call in message.tool_calls:
            texts += [call.name, call.arguments]
        given = "\0".join(texts)
        named = [text for text in self.literals if text in given]
        begins = [text for text in named if message.content.startswith(text)]
        looks = (
            message.role,
            bool(message.content),
            bool(message.content.strip()),
            bool(message.reasoning.strip()),
            tuple(type(call.parsed_arguments()) for call in message.tool_calls[:2]),
            bool(message.name),
            bool(message.tool_call_id),
            tuple(named),
            tuple(begins),
        )
        number = self._sorts.pop(looks, None)
        if number is None:
            number = next(self._numbers)
            if len(self._sorts) >= MAX_SORTS:
                del self._sorts[next(iter(self._sorts))]
        self._sorts[looks] = number
        return number

    def stand_in(
        self,
        messages: Sequence[Message],
        sorts: Sequence[int],
        num_history: int,
        has_tools: bool,
    ) -> StandIn | None:
        """For a conversation whose answer is `messages[num_history - 1]`; None where the whole of
        it is to be rendered. `sorts`: of each message."""
        answer = num_history - 1
        first = _next(messages, 0, answer)
        before = _last(messages, "assistant", answer)
        if first is None or before is None:
            return None
        asked = _last(messages, "user", answer)
        if asked is None or asked <= first or asked > before:
            gaps = [range(first + 1, before)]
        else:
            start = _last(messages, "assistant", asked)
            start = first if start is None else start
            gaps = [range(first + 1, start), range(asked + 1, before)]
        num_left_out = sum(map(len, gaps))
        if num_left_out < MIN_LEFT_OUT:
            return None
        left_out = [frozenset(sorts[gap.start : gap.stop]) for gap in gaps]
        indices: list[int] = []
        position = 0
        for gap in gaps:
            if gap:
                indices += range(position, gap.start)
                position = gap.stop
        indices += range(position, len(messages))
        shown = tuple(sorts[index] for index in indices)
        if len(shown) + sum(map(len, left_out)) > MAX_KIND:
            return None
        sizes = tuple((len(gap) % 2, len(gap).bit_length()) for gap in gaps)
        kept = (indices.index(answer), has_tools)
        return StandIn(tuple(indices), (shown, tuple(left_out), sizes, kept))

    def is_shown(self, kind: Kind) -> bool | None:
        """Whether the stand-in says the same; None where nobody has looked."""
        return self._shown.get(kind)

    def is_known(
        self,
        messages: Sequence[Message],
        sorts: Sequence[int],
        num_history: int,
        has_tools: bool,
    ) -> bool:
        """Whether a stand-in is enough."""
        stand_in = self.stand_in(messages, sorts, num_history, has_tools)
        return stand_in is not None and self.is_shown(stand_in.kind) is True

    def note(self, kind: Kind, same: bool) -> None:
        if len(self._shown) >= MAX_KINDS:
            self._shown.pop(next(iter(self._shown)), None)
        self._shown[kind] = same and self._shown.get(kind, True)


def _next(messages: Sequence[Message], start: int, end: int) -> int | None:
    """The first message that is not the system's."""
    return next((i for i in range(start, end) if messages[i].role != "system"), None)


def _last(messages: Sequence[Message], role: str, end: int) -> int | None:
    return next((i for i in range(end - 1, -1, -1) if messages[i].role == role), None)
