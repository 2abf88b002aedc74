"""Training samples → packed micro-batches within a token budget. Pure.

A micro-batch is as many rows as the budget gives, as long as its longest sample; what is shorter
shares rows. Invariants: every trained token of every sample is in exactly one micro-batch; a
micro-batch's tokens, padding included, stay within the budget unless it holds a single sample that
alone is longer; the same samples give the same micro-batches.

Padding is on the right: under causal attention no real position sees a later one, so padding
changes no logprob and needs no attention mask (which would cost the fast attention kernels). Where
samples share a row, position numbers begin anew with each, which is how transformers is told that
they do not see one another (`model` checks that it is so).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from areal_sub.learner.inputs import TokenSample
from areal_sub.records import Float32Array, Int32Array


@dataclass(frozen=True, slots=True)
class Scored:
    """A sample and what its tokens are worth."""

    sample: TokenSample
    advantages: Float32Array  # [L], as the sample's arrays; read where `loss_mask` is set

    @property
    def num_inputs(self) -> int:
        """Tokens that the model must read: up to the one before the last trained token."""
        return int(np.flatnonzero(self.sample.loss_mask)[-1])


_ARRAYS = {
    "token_ids": np.int32,
    "loss_mask": np.bool_,
    "rollout_logprobs": np.float32,
    "versions": np.int32,
}


def pack_scored(items: Sequence[Scored]) -> list[list[bytes]]:
    """Plain values for another process; `unpack_scored` is the way back."""
    return [
        [
            *(
                np.asarray(getattr(i.sample, n)).astype(t, copy=False).tobytes()
                for n, t in _ARRAYS.items()
            ),
            i.advantages.astype(np.float32, copy=False).tobytes(),
        ]
        for i in items
    ]


@dataclass(frozen=True, slots=True)
class PlainSample:
    """A sample from another process, with what a training step reads."""

    token_ids: Int32Array
    loss_mask: NDArray[np.bool_]
    rollout_logprobs: Float32Array
    versions: Int32Array


def unpack_scored(packed: Sequence[Sequence[bytes]]) -> list[Scored]:
    return [
        Scored(
            PlainSample(
                *(np.frombuffer(raw, t) for raw, t in zip(arrays, _ARRAYS.values(), strict=True))
            ),
            np.frombuffer(advantages, np.float32),
        )
        for *arrays, advantages in packed
    ]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The input of one forward pass, and its N trained tokens."""

    input_ids: Tensor  # int64 [B, T], right-padded with 0
    position_ids: Tensor | None  # int64 [B, T]; None where no two samples share a row
    positions: Tensor  # int64 [N] index into the flattened [B * T]: where each token is predicted
    targets: Tensor  # int64 [N] the trained tokens
    rollout_logprobs: Tensor  # float32 [N]
    advantages: Tensor  # float32 [N]
    versions: Tensor  # int64 [N] policy versions that sampled them
    sequences: Tensor  # int64 [N] the sample that each is of, from 0 to `num_sequences` - 1
    num_sequences: int
    num_inputs: int  # tokens of `input_ids` that are not padding

    @property
    def num_trained_tokens(self) -> int:
        return self.targets.numel()

    def to(self, device: torch.device) -> MicroBatch:
        moved: dict[str, Any] = {
            name: value.to(device)
            for name in self.__slots__
            if isinstance(value := getattr(self, name), Tensor)
        }
        return replace(self, **moved)


Rows = list[list[int]]


def plan_micro_batches(lengths: Sequence[int], max_tokens: int, *, pack: bool) -> list[Rows]:
    """Indices of `lengths` as micro-batches of rows: `len(rows) * longest` is at most `max_tokens`.

    Longest first, each into the first row that has room for it (with `pack`; otherwise a row is one
    sample, and like lengths are neighbours). What alone is longer than the budget is alone.
    """
    plan: list[Rows] = []
    room: list[list[int]] = []  # of each row
    width = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        fitting = (
            (rows, rooms, at)
            for rows, rooms in zip(plan, room, strict=True)
            for at, left in enumerate(rooms)
            if pack and left >= length
        )
        if (place := next(fitting, None)) is not None:
            rows, rooms, at = place
            rows[at].append(index)
            rooms[at] -= length
            continue
        if not plan or (len(plan[-1]) + 1) * width > max_tokens:
            plan.append([])
            room.append([])
            width = length
        plan[-1].append([index])
        room[-1].append(width - length)
    return plan


def collate(rows: Sequence[Sequence[Scored]]) -> MicroBatch:
    """One micro-batch of `rows` of samples, each of which trains at least one token."""
    width = max(sum(item.num_inputs for item in row) for row in rows)
    input_ids = np.zeros((len(rows), width), dtype=np.int64)
    position_ids = np.tile(np.arange(width, dtype=np.int64), (len(rows), 1))
    positions, targets, logprobs, advantages, versions, lengths = [], [], [], [], [], []
    for at, row in enumerate(rows):
        start = 0
        for item in row:
            sample, end = item.sample, start + item.num_inputs
            trained = np.flatnonzero(sample.loss_mask)
            if trained[0] == 0:
                raise ValueError(
                    "the first token of a sample cannot be trained: nothing predicts it"
                )
            input_ids[at, start:end] = sample.token_ids[: item.num_inputs]
            position_ids[at, start:] = np.arange(width - start)
            positions.append(at * width + start + trained - 1)
            targets.append(sample.token_ids[trained])
            logprobs.append(sample.rollout_logprobs[trained])
            advantages.append(item.advantages[trained])
            versions.append(sample.versions[trained])
            lengths.append(len(trained))
            start = end

    def joined(arrays: Sequence[NDArray[Any]], dtype: type) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays).astype(dtype))

    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids) if any(len(r) > 1 for r in rows) else None,
        positions=joined(positions, np.int64),
        targets=joined(targets, np.int64),
        rollout_logprobs=joined(logprobs, np.float32),
        advantages=joined(advantages, np.float32),
        versions=joined(versions, np.int64),
        sequences=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)),
        num_sequences=len(lengths),
        num_inputs=sum(item.num_inputs for row in rows for item in row),
    )


def micro_batches(items: Sequence[Scored], max_tokens: int, *, pack: bool) -> list[MicroBatch]:
    """All of `items` as micro-batches of at most `max_tokens` tokens, padding included."""
    plan = plan_micro_batches([item.num_inputs for item in items], max_tokens, pack=pack)
    return [collate([[items[i] for i in row] for row in rows]) for rows in plan]
