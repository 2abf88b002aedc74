"""A group of processes that weights are broadcast in: who sends them, and a server's workers.

Both sides import this; it knows neither vLLM nor anything else of ours. Not torch's default group,
which a worker has already, but a group of its own, over a store that the sender serves.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SENDER = 0
"""Its rank; workers have 1, 2 ..."""


def address_towards(host: str) -> str:
    """This machine's address that packets to `host` leave from. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        address: str = probe.getsockname()[0]
        return address


def join(
    kind: str, store: Any, name: str, *, rank: int, size: int, address: str, timeout_s: float
) -> Any:
    """The group `name`, once all have joined it.

    Args:
        kind: "gloo" or "nccl".
        store: the sender's `TCPStore`, or a client of it.
        address: of this process's machine, where the others reach it.
        timeout_s: of joining, and of each broadcast later.
    """
    timeout = timedelta(seconds=timeout_s)
    store = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
    if kind == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, options)
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, size, options)


def device_of(kind: str) -> torch.device:
    """Where tensors have to be that the group sends and receives."""
    return torch.device("cuda" if kind == "nccl" else "cpu")


def broadcast(group: Any, tensor: Tensor) -> None:
    """The sender's `tensor` into everyone's. Raises `RuntimeError` where one is missing."""
    options = dist.BroadcastOptions()
    options.rootRank = SENDER
    options.rootTensor = 0
    group.broadcast([tensor], options).wait()


def send(group: Any, kind: str, tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        broadcast(group, tensor.contiguous().to(device_of(kind)))


def receive(
    group: Any, kind: str, described: Iterable[tuple[str, str, list[int]]]
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each. `described`: names, dtypes and shapes in the order of sending."""
    for name, dtype, shape in described:
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device_of(kind))
        broadcast(group, tensor)
        yield name, tensor
