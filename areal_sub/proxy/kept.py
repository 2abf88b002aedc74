"""Answers that later calls of the same rollout may name instead of repeating them.

Owned by the rollout's session and gone with it. Bounded in number and bytes: the oldest go first.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from areal_sub.proxy.neutral import Message

MAX_KEPT = 256
MAX_KEPT_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Kept:
    conversation: tuple[Message, ...]  # the answer included
    body: bytes  # as it was answered
    num_bytes: int  # of the call and its answer


@dataclass(slots=True)
class KeptAnswers:
    _by_id: dict[str, Kept] = field(default_factory=dict)  # oldest first
    _num_bytes: int = 0

    def add(self, answer_id: str, kept: Kept) -> None:
        self._by_id[answer_id] = kept
        self._num_bytes += kept.num_bytes
        while len(self._by_id) > MAX_KEPT or self._num_bytes > MAX_KEPT_BYTES:
            self.remove(next(iter(self._by_id)))

    def get(self, answer_id: str) -> Kept | None:
        return self._by_id.get(answer_id)

    def remove(self, answer_id: str) -> bool:
        kept = self._by_id.pop(answer_id, None)
        self._num_bytes -= kept.num_bytes if kept else 0
        return kept is not None
