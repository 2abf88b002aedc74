"""Keys and values of the batch: per layer one buffer `[rows, kv_heads, length, head_dim]`.

A transformers `Cache`: the model writes through `update` and attends to what it returns. Only the
decode thread touches it.

Invariants: the rows of a batch are contiguous, so what attention reads is a view and nothing is
gathered; buffers start as zeros and hold only finite numbers, since a masked position still enters
attention as `0 * value`; a row's content beyond its request's `num_cached` is never attended to.
Buffers grow and shrink by need (`batch.capacity`): nothing is reserved for `max_model_len`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from areal_sub.engines.embedded.batch import capacity

# Rows are lengthened in steps of this many tokens, and attention reads multiples of `VIEW_STEP`:
# kernels want aligned lengths, and the allocator sees few different sizes.
LENGTH_STEP = 64
VIEW_STEP = 16
ROW_STEP = 4

KeyValues = list[tuple[Tensor, Tensor]]
"""Of one row, per layer: keys and values, each [kv_heads, length, head_dim]."""


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's buffers. Its shapes are taken from what the model first writes."""

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, length = self._cache.num_rows, self._cache.length
        self.keys = _zeros_like(key_states, rows, length)
        self.values = _zeros_like(value_states, rows, length)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [batch, kv_heads, new, head_dim] and return [batch, kv_heads, view, head_dim]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, first, stop, positions, view = self._cache.selected
        # Indexed like this, the heads come last but one: [batch, new, kv_heads, head_dim].
        self.keys[rows, :, positions] = key_states.transpose(1, 2)
        self.values[rows, :, positions] = value_states.transpose(1, 2)
        return self.keys[first:stop, :, :view], self.values[first:stop, :, :view]

    def resize(self, rows: int, length: int, used_rows: int, used_length: int) -> None:
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = _zeros_like(old, rows, length)
            used_rows = min(used_rows, old.shape[0])
            new[:used_rows, :, :used_length] = old[:used_rows, :, :used_length]
            setattr(self, name, new)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.selected[4], 0

    def get_seq_length(self) -> int:
        return self._cache.selected[4]

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):  # type: ignore[misc]
    def __init__(self, num_layers: int) -> None:
        self.num_rows = 0
        self.length = 0
        nothing = torch.empty(0)
        self.selected: tuple[Tensor, int, int, Tensor, int] = (nothing, 0, 0, nothing, 0)
        super().__init__(layers=[SlotLayer(self) for _ in range(num_layers)])

    @property
    def _written(self) -> list[SlotLayer]:
        """Layers that have buffers; those that share another's keys and values have none."""
        return [layer for layer in self.layers if layer.is_initialized]

    def select(self, first_row: int, positions: Tensor, view_length: int) -> None:
        """Say where the next forward pass writes and reads.

        Args:
            first_row: the batch's first row in the cache.
            positions: int64 [batch, new], where each new token's keys and values go.
            view_length: tokens per row that attention reads, at most `length`.
        """
        stop = first_row + positions.shape[0]
        rows = torch.arange(first_row, stop, device=positions.device).unsqueeze(1)
        self.selected = (rows, first_row, stop, positions, view_length)

    def fit(self, num_rows: int, length: int, *, used_rows: int, used_length: int) -> None:
        """Make room for `num_rows` rows of `length` tokens, keeping the used part."""
        rows = capacity(self.num_rows, num_rows, step=ROW_STEP)
        length = capacity(self.length, length, step=LENGTH_STEP)
        if (rows, length) == (self.num_rows, self.length):
            return
        self.num_rows, self.length = rows, length
        for layer in self._written:
            layer.resize(rows, length, used_rows, used_length)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of row `source` to row `target`."""
        for layer in self._written:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]

    def clear(self, row: int) -> None:
        """Zero a row: what keeps not-a-number from outliving the request that met it."""
        for layer in self._written:
            layer.keys[row].zero_()
            layer.values[row].zero_()

    def read(self, row: int, length: int) -> KeyValues:
        """A copy of the first `length` tokens of a row."""
        return [
            (layer.keys[row, :, :length].clone(), layer.values[row, :, :length].clone())
            for layer in self._written
        ]

    def write(self, row: int, key_values: KeyValues, length: int) -> None:
        """Put the first `length` tokens of what `read` gave at the start of a row."""
        for layer, (keys, values) in zip(self._written, key_values, strict=True):
            layer.keys[row, :, :length] = keys[:, :length]
            layer.values[row, :, :length] = values[:, :length]

    def bytes_per_token(self) -> int:
        """Of all layers together, once the model has written to each."""
        return sum(
            t.shape[1] * t.shape[3] * t.element_size()
            for layer in self._written
            for t in (layer.keys, layer.values)
        )


def _zeros_like(states: Tensor, rows: int, length: int) -> Tensor:
    shape = (rows, states.shape[1], length, states.shape[3])
    return torch.zeros(shape, dtype=states.dtype, device=states.device)
