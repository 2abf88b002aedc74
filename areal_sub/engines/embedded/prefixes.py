"""Keys and values kept from finished requests, so that a rollout's next turn need not recompute its
whole conversation.

Owned by the decode thread. Invariants: all entries are of one policy version (a weight update
clears the store); an entry serves only requests of its own affinity, so one rollout's timing says
nothing of another's prompts; entries together stay under `max_bytes`, the least recently used going
first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from areal_sub.engines.embedded.cache import KeyValues
from areal_sub.records import Int32Array

# Shorter matches cost more to copy than to compute.
MIN_MATCH = 16


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    affinity: str
    token_ids: Int32Array  # [length]
    key_values: KeyValues  # of at least `length` tokens
    num_bytes: int


class Prefixes:
    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: list[Prefix] = []  # least recently used first

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self._entries)

    def find(self, affinity: str, prompt: Int32Array) -> tuple[Prefix, int] | None:
        """The entry that shares most with `prompt`, and how many tokens of it to use.

        Always fewer than the prompt has: its last token must be computed to sample from.
        """
        best: tuple[Prefix, int] | None = None
        for entry in self._entries:
            if entry.affinity == affinity:
                length = min(common_prefix(entry.token_ids, prompt), prompt.size - 1)
                if length >= MIN_MATCH and (best is None or length > best[1]):
                    best = (entry, length)
        if best is not None:
            self._entries.remove(best[0])
            self._entries.append(best[0])
        return best

    def wants(self, affinity: str, num_tokens: int, num_bytes: int) -> bool:
        """Whether an entry like this would be kept; asked before the copy is made."""
        return bool(affinity) and num_tokens >= MIN_MATCH and num_bytes <= self._max_bytes

    def add(self, entry: Prefix) -> None:
        """Keep `entry`, instead of those of its affinity that it continues."""
        self._entries = [
            old
            for old in self._entries
            if old.affinity != entry.affinity
            or common_prefix(old.token_ids, entry.token_ids) < old.token_ids.size
        ]
        self._entries.append(entry)
        excess = self.num_bytes - self._max_bytes
        while excess > 0:
            excess -= self._entries.pop(0).num_bytes

    def clear(self) -> None:
        self._entries.clear()


def common_prefix(one: Int32Array, other: Int32Array) -> int:
    """How many tokens both begin with."""
    length = min(one.size, other.size)
    different = np.flatnonzero(one[:length] != other[:length])
    return int(different[0]) if different.size else length
