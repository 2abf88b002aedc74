"""A rollout's turns as a prefix-sharing tree, built from its records.

Invariants of a built `Trajectory`: every turn's parent comes before it in `turns`; a turn's full
sequence is its parent's full sequence, then `context_token_ids`, then `token_ids`, nothing else.
Called by the trainer's record stream and by whatever reads a journal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from areal_sub.errors import RecordError
from areal_sub.records import EndRecord, Int32Array, OpenRecord, Outcome, TurnRecord, int32


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One ended rollout."""

    open: OpenRecord
    turns: dict[str, TurnRecord]  # turn_id → turn, in the order of recording: parents first
    children: dict[str | None, list[str]]  # turn_id → ids of the turns that extend it; None: roots
    end: EndRecord
    attempt: int = 0  # of the run, whose journal it is from; 0: the one that goes on
    went_on_from: int | None = None
    """Of an earlier attempt: the version that the run was resumed with after it."""

    @classmethod
    def build(
        cls,
        opened: OpenRecord,
        turns: Iterable[TurnRecord],
        end: EndRecord,
        *,
        attempt: int = 0,
        went_on_from: int | None = None,
    ) -> Trajectory:
        """From one rollout's records, the turns in the order in which they were recorded.

        Raises `RecordError` where a record belongs to another rollout or a turn does not fit its
        parent.
        """
        by_id: dict[str, TurnRecord] = {}
        children: dict[str | None, list[str]] = {}
        for turn in turns:
            _check_turn(turn, opened.rollout_id, by_id)
            by_id[turn.turn_id] = turn
            children.setdefault(turn.parent_turn_id, []).append(turn.turn_id)
        if end.rollout_id != opened.rollout_id or end.num_turns != len(by_id):
            raise RecordError(
                f"rollout {opened.rollout_id}: {len(by_id)} turns, but its end record says "
                f"{end.num_turns} turns of rollout {end.rollout_id}"
            )
        return cls(
            open=opened,
            turns=by_id,
            children=children,
            end=end,
            attempt=attempt,
            went_on_from=went_on_from,
        )

    @property
    def reward(self) -> float:
        """The final reward, or the sum of the turns' rewards where those were given."""
        end = self.end
        return sum(end.turn_rewards.values()) if end.reward is None else end.reward

    @property
    def oldest_version(self) -> int:
        """Smallest policy version of a sampled token; the version at opening where none was.

        Versions beyond `went_on_from` were lost with their attempt: the policies that have their
        numbers now are others. They are as far from `went_on_from` as if they lay before it.
        """
        versions = [turn.versions for turn in self.turns.values() if len(turn.versions)]
        oldest = min((int(v.min()) for v in versions), default=self.open.policy_version)
        if self.went_on_from is None:
            return oldest
        newest = max((int(v.max()) for v in versions), default=self.open.policy_version)
        return min(oldest, self.went_on_from, 2 * self.went_on_from - newest)

    @property
    def num_bytes(self) -> int:
        """Of its tokens with all that belongs to them: what it mostly takes in memory."""
        return sum(turn.num_bytes for turn in self.turns.values())

    @property
    def is_trainable(self) -> bool:
        """It completed, or its failure has a reward (`rollout.failures`)."""
        return self.end.outcome is Outcome.COMPLETED or self.end.reward is not None

    def branch(self, turn_id: str) -> list[TurnRecord]:
        """The turns from the root to `turn_id`, both included."""
        branch = [self.turns[turn_id]]
        while (parent_id := branch[-1].parent_turn_id) is not None:
            branch.append(self.turns[parent_id])
        return branch[::-1]

    def branches(self) -> list[list[TurnRecord]]:
        """Every root-to-leaf branch; leaves in the order of recording."""
        return [self.branch(turn_id) for turn_id in self.turns if turn_id not in self.children]

    def sequence(self, turn_id: str) -> Int32Array:
        """The full sequence of a turn, prompt and sampled tokens: [num_prompt + num_sampled]."""
        parts: list[Int32Array] = []
        for turn in self.branch(turn_id):
            parts += [turn.context_token_ids, turn.token_ids]
        return int32(np.concatenate(parts))


def _check_turn(turn: TurnRecord, rollout_id: str, earlier: Mapping[str, TurnRecord]) -> None:
    where = f"rollout {turn.rollout_id}, turn {turn.turn_id}"
    if turn.rollout_id != rollout_id:
        raise RecordError(f"{where}: among the records of rollout {rollout_id}")
    if turn.turn_id in earlier:
        raise RecordError(f"{where}: recorded twice")
    if not len(turn.token_ids) == len(turn.rollout_logprobs) == len(turn.versions):
        raise RecordError(f"{where}: token ids, logprobs and versions differ in length")
    if turn.continues_turn_id is not None and turn.continues_turn_id not in earlier:
        raise RecordError(
            f"{where}: it goes on from {turn.continues_turn_id}, which was not recorded before it"
        )
    num_prompt = len(turn.context_token_ids)
    if turn.parent_turn_id is not None:
        parent = earlier.get(turn.parent_turn_id)
        if parent is None:
            raise RecordError(f"{where}: parent {turn.parent_turn_id} was not recorded before it")
        num_prompt += parent.num_prompt_tokens + len(parent.token_ids)
    if turn.num_prompt_tokens != num_prompt:
        raise RecordError(
            f"{where}: says {turn.num_prompt_tokens} prompt tokens, but its parent's sequence and "
            f"its context are {num_prompt}"
        )
