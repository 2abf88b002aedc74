"""Weights from this machine into the workers of one vLLM server, wherever it runs.

The sending side of the plugin's backends `areal-sub-gloo` and `areal-sub-nccl`. Serves the store
that the group is made over, on the address from which the server is reached and on no other. Its
port has no password: the network between trainer and servers is a private one.

Only here the engine's process for vLLM needs torch, and nccl a GPU.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from areal_sub.engines.safetensors_file import files_of
from areal_sub.engines.vllm.plugin.areal_sub_vllm import group
from areal_sub.engines.vllm.weights_file import dtypes_of, shapes_of
from areal_sub.errors import ConfigError


class Sender:
    """To one server. After an error it is of no use any more: make another."""

    def __init__(self, kind: str, host: str, *, num_workers: int, timeout_s: float) -> None:
        """`host`: the server's. Raises `ConfigError`."""
        if kind == "nccl" and not torch.cuda.is_available():
            raise ConfigError(
                "the server takes weights by NCCL (areal-sub-nccl), and this machine has no GPU: "
                'restart it with --weight-transfer-config \'{"backend": "areal-sub-gloo"}\''
            )
        self._kind = kind
        self._size = 1 + num_workers
        self._timeout_s = timeout_s
        self._name = secrets.token_hex(8)
        self._group: Any = None
        try:
            self._address = group.address_towards(host)
            listener = socket.create_server((self._address, 0))
        except OSError as error:
            raise ConfigError(f"no way to {host}, where a server is: {error}") from None
        self._port: int = listener.getsockname()[1]
        self._store: Any = dist.TCPStore(  # type: ignore[attr-defined]
            self._address,
            self._port,
            self._size,
            is_master=True,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),  # the store's from here on
        )

    def update_info(self, path: Path) -> dict[str, Any]:
        """What the workers have to know of an update: `BroadcastInfo`."""
        dtypes, shapes = dtypes_of(path), shapes_of(path)
        return {
            "group": self._name,
            "host": self._address,
            "port": self._port,
            "size": self._size,
            "timeout_s": self._timeout_s,
            "tensors": [[name, dtype, shapes[name]] for name, dtype in dtypes.items()],
        }

    def send(self, path: Path) -> None:
        """Blocks until all workers have received it. Raises `RuntimeError`."""
        if self._group is None:
            self._group = group.join(
                self._kind,
                self._store,
                self._name,
                rank=group.SENDER,
                size=self._size,
                address=self._address,
                timeout_s=self._timeout_s,
            )
        group.send(self._group, self._kind, _tensors(path))

    def close(self) -> None:
        """Ends a `send` that waits, as far as the group's kind can. A group that is still there at
        the interpreter's end may end it by `abort()`."""
        if self._group is not None:
            with suppress(RuntimeError):
                self._group.abort()
        self._group = self._store = None


def _tensors(path: Path) -> Iterator[Tensor]:
    """In the order of `dtypes_of`."""
    for file in files_of(path):
        with safe_open(str(file), framework="pt") as weights:
            for name in dtypes_of(file):
                yield weights.get_tensor(name)
