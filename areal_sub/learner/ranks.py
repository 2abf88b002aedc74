"""Several processes as one learner: rank 0 in the trainer, the others started by it.

All ranks run the same code (SPMD over torch.distributed); each computes its share of the
micro-batches and holds its shard of weights, gradients and optimizer (FSDP2). Rank 0 leads: it
sends a command with its data, and the others do their part of it (`follower`).

Two groups: one for commands, in which followers wait as long as rollouts take, and one for the
computing, in which no wait is longer than `timeout_s`. Each rank notes in the folder what it is at;
when a wait fails, rank 0 says who is behind. Nothing is pickled: commands are msgpack.

Called by `learner`, `model` and `follower`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from areal_sub.errors import LearnerRankError

# Followers wait for commands while rollouts go on; the leader's end ends that wait in any case.
_COMMANDS_TIMEOUT = timedelta(days=30)


@dataclass(frozen=True, slots=True)
class RankPlace:
    """Which process of how many, and where they meet."""

    rank: int
    num_ranks: int
    folder: Path  # new for each run, mode 0700, on this machine
    join_timeout_s: float  # until all have come
    timeout_s: float  # of any later wait for another, but a follower's for a command


class Ranks:
    """This process among the others. Use `Ranks.join`; one at a time in a process."""

    def __init__(self, place: RankPlace, mesh: DeviceMesh, commands: dist.ProcessGroup) -> None:
        self.rank = place.rank
        self.num_ranks = place.num_ranks
        self.mesh = mesh
        self._place = place
        self._commands = commands
        self._num_notes = 0

    @classmethod
    def join(cls, place: RankPlace, device: torch.device) -> Ranks:
        """Waits for all ranks. Raises `LearnerRankError` where they do not come in time."""
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        backend = "gloo"
        if device.type == "cuda":
            # A wait that fails is an exception here, and not the end of the whole process.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        timeout = timedelta(seconds=place.timeout_s)
        if dist.is_initialized():  # of an earlier run in this process that failed
            dist.destroy_process_group()
        _note(place, 0, "joining")
        with _blaming(place):
            store = FileStore(str(place.folder / "rendezvous"), place.num_ranks)
            store.set(f"rank-{place.rank}", "here")
            everyone = [f"rank-{rank}" for rank in range(place.num_ranks)]
            store.wait(everyone, timedelta(seconds=place.join_timeout_s))
            dist.init_process_group(
                backend,
                store=store,
                rank=place.rank,
                world_size=place.num_ranks,
                timeout=timeout,
            )
            commands = dist.new_group(backend="gloo", timeout=_COMMANDS_TIMEOUT)
            mesh = init_device_mesh(device.type, (place.num_ranks,))
        return cls(place, mesh, commands)

    def leave(self) -> None:
        dist.destroy_process_group()

    def note(self, what: str) -> None:
        """This process is now at `what`."""
        self._num_notes += 1
        _note(self._place, self._num_notes, what)

    def blaming(self) -> AbstractContextManager[None]:
        """Context: what torch.distributed raises becomes a `LearnerRankError` with the culprit."""
        return _blaming(self._place)

    def send(self, command: dict[str, Any]) -> None:
        """Rank 0: to all others, within the deadline, which the group's own wait has not."""
        data = np.frombuffer(msgpack.packb(command), dtype=np.uint8).copy()
        for tensor in (torch.tensor([data.size]), torch.from_numpy(data)):
            work = dist.broadcast(tensor, 0, group=self._commands, async_op=True)
            work.wait(timedelta(seconds=self._place.timeout_s))

    def receive(self) -> dict[str, Any]:
        """The others: the next command. Without a deadline: see the module's text."""
        size = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(size, 0, group=self._commands)
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, 0, group=self._commands)
        command: dict[str, Any] = msgpack.unpackb(data.numpy().tobytes(), strict_map_key=False)
        return command

    def sum(self, values: Tensor) -> Tensor:
        """Over all ranks, on the CPU."""
        values = values.cpu().clone()
        dist.all_reduce(values, dist.ReduceOp.SUM)
        return values

    def max(self, values: Tensor) -> Tensor:
        values = values.cpu().clone()
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values


def whole(value: Tensor) -> Tensor:
    """A tensor that may be sharded, gathered. All ranks must call it, in the same order."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of a whole tensor, cut as `like` is; as it is where `like` is not, and
    where it is a single number."""
    if not isinstance(like, DTensor) or not value.ndim:
        return value
    if value.shape != like.shape:
        raise ValueError(f"a tensor of shape {tuple(value.shape)}, not {tuple(like.shape)}")
    mesh = like.device_mesh
    value = value.to(mesh.device_type)
    return distribute_tensor(value, mesh, like.placements, src_data_rank=None)


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}"


def _note(place: RankPlace, number: int, what: str) -> None:
    path = _path(place.folder, place.rank)
    partial = path.with_suffix(".partial")
    partial.write_text(f"{number} {what}")
    partial.replace(path)


@contextmanager
def _blaming(place: RankPlace) -> Iterator[None]:
    started_at = time.monotonic()
    try:
        yield
    except RuntimeError as error:  # DistBackendError, gloo's, the store's: all are
        waited_s = time.monotonic() - started_at
        raise LearnerRankError(
            f"the learner's ranks lost one another after {waited_s:.0f} s "
            f"(actor.rank_timeout_s: {place.timeout_s:g} s): {_who_is_behind(place)}; what "
            f"torch.distributed said: {str(error).partition(chr(10))[0]}"
        ) from error


def _who_is_behind(place: RankPlace) -> str:
    """In words, from the notes of all ranks."""
    notes: dict[int, tuple[int, str, float]] = {}
    for rank in range(place.num_ranks):
        path = _path(place.folder, rank)
        try:
            number, _, what = path.read_text().partition(" ")
            notes[rank] = int(number), what, time.time() - path.stat().st_mtime
        except OSError:
            notes[rank] = -1, "starting", 0.0
    others = {rank: note for rank, note in notes.items() if rank != place.rank}
    fewest = min(number for number, _, _ in others.values())
    behind = {
        rank: note
        for rank, note in others.items()
        if note[0] == fewest or fewest >= notes[place.rank][0]
    }
    return "; ".join(
        f"rank {rank} did not get past {what!r}, at which it has been for {age_s:.0f} s"
        for rank, (_, what, age_s) in behind.items()
    )
