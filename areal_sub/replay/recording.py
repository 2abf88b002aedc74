"""The recorded turns of one rollout, given out again to whoever asks as it was asked then. Pure.

A call is answered with the first turn, not given out yet, whose whole prompt is the call's, token
for token. Any other call is a `Divergence`, which says where it leaves the record.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from areal_sub.errors import ArealSubError
from areal_sub.records import Int32Array, TurnRecord, int32

_SHOWN_TOKENS = 24


class Divergence(ArealSubError):
    """The agent asks for something that was not asked for in the recorded rollout."""


class Words(Protocol):
    """What a tokenizer is needed for."""

    control_ids: dict[str, int]

    def decode(self, token_ids: Sequence[int]) -> str: ...


@dataclass(slots=True)
class _Turn:
    prompt: Int32Array
    record: TurnRecord
    is_given: bool = False


class Recording:
    def __init__(self, turns: Iterable[TurnRecord]) -> None:
        """`turns`: of one rollout, in the order in which they were recorded."""
        self._turns: list[_Turn] = []
        sequences: dict[str | None, Int32Array] = {None: int32([])}
        for turn in turns:
            prompt = np.concatenate([sequences[turn.parent_turn_id], turn.context_token_ids])
            sequences[turn.turn_id] = np.concatenate([prompt, turn.token_ids])
            self._turns.append(_Turn(int32(prompt), turn))

    def __len__(self) -> int:
        return len(self._turns)

    @property
    def num_given(self) -> int:
        return sum(turn.is_given for turn in self._turns)

    def give(self, prompt: Int32Array, max_new_tokens: int, words: Words) -> TurnRecord:
        """The answer to a call. Raises `Divergence`."""
        left = [turn for turn in self._turns if not turn.is_given]
        call = f"call {self.num_given + 1}"
        if not left:
            raise Divergence(
                f"{call}: the recorded rollout made {len(self)} calls; this is one more, and its "
                f"prompt ends with {_shown(prompt[-_SHOWN_TOKENS:], words)}"
            )
        same = next((turn for turn in left if np.array_equal(turn.prompt, prompt)), None)
        if same is None:
            nearest = max(left, key=lambda turn: num_common(turn.prompt, prompt))
            turn_id = nearest.record.turn_id
            raise Divergence(
                f"{call}: {difference(nearest.prompt, prompt, words)} (turn {turn_id})"
            )
        if len(same.record.token_ids) > max_new_tokens:
            raise Divergence(
                f"{call}: it asks for at most {max_new_tokens} tokens; the recorded answer has "
                f"{len(same.record.token_ids)} (turn {same.record.turn_id})"
            )
        same.is_given = True
        return same.record


def num_common(one: Int32Array, other: Int32Array) -> int:
    """Length of the common beginning."""
    size = min(len(one), len(other))
    differs = np.flatnonzero(one[:size] != other[:size])
    return int(differs[0]) if len(differs) else size


def difference(recorded: Int32Array, asked: Int32Array, words: Words) -> str:
    """Where and how the prompt `asked` leaves `recorded`, by message, token and text."""
    at = num_common(recorded, asked)
    message = _message_at(recorded, asked, at, set(words.control_ids.values()))
    where = f"at token {at} of its prompt" + (f", in message {message}" if message else "")
    before = recorded[max(0, at - _SHOWN_TOKENS) : at]

    def following(token_ids: Int32Array) -> str:
        rest = token_ids[at : at + _SHOWN_TOKENS]
        return _shown(rest, words) if len(rest) else "its end"

    return (
        f"{where}, after {_shown(before, words)}: recorded is {following(recorded)}, "
        f"asked is {following(asked)}"
    )


def _message_at(recorded: Int32Array, asked: Int32Array, at: int, control: Collection[int]) -> int:
    """The number of the message that the token `at` lies in, from 1; 0 where it cannot be told.

    What begins a message is the first control token that comes more than once.
    """
    longer = recorded if len(recorded) >= len(asked) else asked
    found = [token_id for token_id in longer.tolist() if token_id in control]
    opening = next((token_id for token_id in found if found.count(token_id) > 1), None)
    return int(np.count_nonzero(longer[: at + 1] == opening)) if opening is not None else 0


def _shown(token_ids: Int32Array, words: Words) -> str:
    return repr(words.decode(token_ids.tolist()))
