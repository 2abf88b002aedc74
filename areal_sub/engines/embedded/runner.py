"""The model and its cache: tokens at given rows and positions in, next-token logits out.

Only the decode thread calls it. It knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from areal_sub.engines.embedded.cache import VIEW_STEP, SlotCache
from areal_sub.engines.embedded.fused import FusedLlama
from areal_sub.errors import ModelError


class Runner:
    def __init__(self, model: Any) -> None:
        """`model`: a loaded causal LM in eval mode; see `weights.load_model`."""
        config = model.config.get_text_config(decoder=True)
        self.model = model
        self.device: torch.device = model.device
        self.vocab_size: int = config.vocab_size
        self.cache = SlotCache(config.num_hidden_layers)
        self._dtype: torch.dtype = model.dtype
        self._fused = FusedLlama(model) if FusedLlama.fits(model) else None

    def forward(
        self, first_row: int, token_ids: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> Tensor:
        """Logits [rows, vocab] after the last of each row's `token_ids`.

        Args:
            first_row: the cache row of the first entry; the others follow it.
            token_ids: per row the new tokens, at least one. Shorter ones are padded in front, so
                that every row's logits are at the last position.
            starts: per row how many tokens it has in the cache, so the position of its first new
                one. The cache must have room for one token more than the longest row gets.
        """
        width = max(len(row) for row in token_ids)
        if width == 1:
            ids = torch.tensor(token_ids, device=self.device)
            positions = writes = torch.tensor(starts, device=self.device).unsqueeze(1)
        else:
            ids, positions, writes = (
                torch.from_numpy(array).to(self.device) for array in _pad(token_ids, starts, width)
            )
        used = max(start + len(row) for row, start in zip(token_ids, starts, strict=True))
        view = min(-(-used // VIEW_STEP) * VIEW_STEP, self.cache.length)
        self.cache.select(first_row, writes, view)
        mask = self._mask(positions, view)
        if self._fused is not None:
            return self._fused(ids, positions, mask, self.cache)
        logits: Tensor = self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1]

    def _mask(self, positions: Tensor, view: int) -> Tensor:
        """Additive mask [rows, 1, new, view]: a token attends to its own position and before.

        In the 4-D form transformers uses it as it is, for every attention implementation, instead
        of deriving one that knows nothing of rows with different positions.
        """
        key_positions = torch.arange(view, device=self.device)
        mask = torch.zeros((*positions.shape, view), dtype=self._dtype, device=self.device)
        return mask.masked_fill_(key_positions > positions.unsqueeze(-1), -torch.inf).unsqueeze(1)


def _pad(
    token_ids: Sequence[Sequence[int]], starts: Sequence[int], width: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Token ids, positions and write positions, each int64 [rows, width], padded in front.

    Padding sits at its row's first new position (so it attends to something, and softmax stays
    finite) and writes its keys and values just behind the row's last new token, where the next
    token overwrites them before anything attends to them.
    """
    ids = np.zeros((len(token_ids), width), dtype=np.int64)
    positions = np.zeros_like(ids)
    writes = np.zeros_like(ids)
    for i, (row, start) in enumerate(zip(token_ids, starts, strict=True)):
        pad, end = width - len(row), start + len(row)
        ids[i, pad:] = row
        positions[i, :pad] = start
        positions[i, pad:] = np.arange(start, end)
        writes[i, :pad] = end
        writes[i, pad:] = positions[i, pad:]
    return ids, positions, writes


def check_runner(runner: Runner) -> None:
    """Compare the cached, padded, batched pass with a plain one, on this model.

    Raises `ModelError` where it fails or differs: the model then derives positions, masks or state
    in a way that this engine does not serve, and would sample from another distribution than it
    should.
    """
    name = type(runner.model).__name__
    try:
        plain, cached = _logits_both_ways(runner)
    except Exception as error:  # whatever an architecture does with a cache it does not know
        raise ModelError(
            f"{name} does not run with this engine's cache ({type(error).__name__}: {error}): the "
            "embedded engine cannot serve this architecture"
        ) from error
    difference = (cached - plain).abs().max().item()
    tolerance = 1e-3 if runner.model.dtype == torch.float32 else 0.1
    scale = max(1.0, plain.abs().max().item())
    if not difference <= tolerance * scale:
        raise ModelError(
            f"{name} gives other logits with this engine's cache than without (they differ by "
            f"{difference:.3g}, logits reach {scale:.3g}): the embedded engine cannot serve this "
            "architecture"
        )


@torch.inference_mode()
def _logits_both_ways(runner: Runner) -> tuple[Tensor, Tensor]:
    """Of two rows of unlike length, after their last token but one and their last, both float32
    [2, 2, vocab]: from plain passes, and from a prefill in two chunks and one decode step."""
    vocab = runner.vocab_size
    rows = [[(7 * i + 3) % vocab for i in range(5)], [(5 * i + 1) % vocab for i in range(9)]]
    plain = [
        runner.model(input_ids=torch.tensor([row], device=runner.device)).logits[0, -2:]
        for row in rows
    ]
    runner.cache.fit(2, 16, used_rows=0, used_length=0)
    runner.forward(0, [row[:3] for row in rows], [0, 0])
    prefilled = runner.forward(0, [row[3:-1] for row in rows], [3, 3])
    decoded = runner.forward(0, [row[-1:] for row in rows], [len(row) - 1 for row in rows])
    return torch.stack(plain).float(), torch.stack([prefilled, decoded], dim=1).float()
