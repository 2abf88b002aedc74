"""What an agent's last calls held, so that only what is new of the next one has to be read.

Agents send their whole history each time, in the items of their dialect. Owned by the rollout's
session and gone with it; bounded in number and bytes. An item counts as seen where its JSON is the
same to the letter: `1`, `1.0` and `true` are equal to Python, and not here.

Several items may make one message, so reading goes on only from where a message ends: there, and
nowhere else, is a `_Mark`. What is kept of a call grows with its size, whatever it consists of.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Protocol

import orjson

from areal_sub.proxy.neutral import Message

# Calls that are remembered: conversations take turns.
MAX_CALLS = 3
MAX_BYTES = 2**20  # of a call that is remembered


class Reader(Protocol):
    """Makes messages of a dialect's items, one after the other; a class for each dialect. What it
    makes of an item may depend on the items before, and on nothing else."""

    messages: list[Message]
    """Those that nothing can be added to any more."""
    state: Any
    """What else it has to know of the items before: small, and replaced, never changed."""

    @property
    def is_open(self) -> bool:
        """Whether a message is being made that is not in `messages` yet."""
        ...

    def read(self, item: Any, index: int) -> None:
        """Raises `Refusal`."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Mark:
    """A place between two items of a call, and what was known there."""

    num_items: int
    num_messages: int
    state: Any


@dataclass(frozen=True, slots=True)
class _Call:
    reader: type[Reader]
    items: list[bytes]
    messages: list[Message]
    marks: list[_Mark]


@dataclass(slots=True)
class Seen:
    _calls: list[_Call] = field(default_factory=list)  # the last last

    def read(self, items: Sequence[Any], reader: Reader) -> tuple[Message, ...]:
        """All that `reader`, which has read nothing yet, makes of `items`. Raises `Refusal`."""
        written = [orjson.dumps(item) for item in items]
        found, num_same = None, 0
        for call in self._calls:
            num = _num_same(call.items, written) if call.reader is type(reader) else 0
            if num > num_same:
                found, num_same = call, num
        marks: list[_Mark] = []
        num_read = 0
        if found is not None:
            marks = found.marks[: bisect_right(found.marks, num_same, key=_NUM_ITEMS)]
            if marks:
                num_read = marks[-1].num_items
                reader.messages = found.messages[: marks[-1].num_messages]
                reader.state = marks[-1].state
        for index in range(num_read, len(items)):
            reader.read(items[index], index)
            if not reader.is_open:
                marks.append(_Mark(index + 1, len(reader.messages), reader.state))
        reader.close()
        if sum(map(len, written)) <= MAX_BYTES:
            went_on = found is not None and num_same == len(found.items)
            others = [call for call in self._calls if not (went_on and call is found)]
            seen = _Call(type(reader), written, reader.messages, marks)
            self._calls = [*others[1 - MAX_CALLS :], seen]
        return tuple(reader.messages)


_NUM_ITEMS = attrgetter("num_items")


def _num_same(some: Sequence[bytes], others: Sequence[bytes]) -> int:
    num = 0
    for one, other in zip(some, others, strict=False):
        if one != other:
            break
        num += 1
    return num
