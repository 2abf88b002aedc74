"""Weights sent to processes that stand where a server's workers would (the real ones: vLLM's)."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from areal_sub.engines.vllm.broadcast import Sender
from areal_sub.errors import ConfigError

WORKER = """
import json, sys
from datetime import timedelta
import torch.distributed as dist
from safetensors.torch import save_file
from areal_sub.engines.vllm.plugin.areal_sub_vllm import group

info, rank, out = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
store = dist.TCPStore(
    info["host"], info["port"], info["size"], is_master=False, timeout=timedelta(seconds=60))
joined = group.join(
    "gloo", store, info["group"], rank=rank, size=info["size"],
    address=group.address_towards(info["host"]), timeout_s=60.0)
for turn in range(int(sys.argv[4])):
    save_file(dict(group.receive(joined, "gloo", info["tensors"])), f"{out}{turn}")
del joined, store  # a group that the interpreter ends may end it first, by abort()
"""


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "weights.safetensors"
    tensors = {
        "a": torch.randn(7, 3),
        "b": torch.randn(5).bfloat16(),
        "c": torch.randn(2, 2).half(),
    }
    save_file(tensors, path)
    return path


def worker(sender: Sender, path: Path, rank: int, turns: int) -> subprocess.Popen[bytes]:
    info = json.dumps(sender.update_info(path))
    out = str(path.with_name(f"received-{rank}-"))
    return subprocess.Popen([sys.executable, "-c", WORKER, info, str(rank), out, str(turns)])


def test_all_workers_get_what_the_file_holds_each_time(weights: Path) -> None:
    sender = Sender("gloo", "127.0.0.1", num_workers=2, timeout_s=60.0)
    workers = [worker(sender, weights, rank, turns=2) for rank in (1, 2)]
    sent = []
    for turn in range(2):
        save_file({name: t + turn for name, t in load_file(weights).items()}, weights)
        sender.send(weights)
        sent.append(load_file(weights))
    assert [process.wait(60) for process in workers] == [0, 0]
    for rank, turn in itertools.product((1, 2), (0, 1)):
        received = load_file(weights.with_name(f"received-{rank}-{turn}"))
        assert received.keys() == sent[turn].keys()
        for name, tensor in sent[turn].items():
            torch.testing.assert_close(received[name], tensor, rtol=0, atol=0)


def test_a_worker_that_dies_is_an_error_within_the_deadline(weights: Path) -> None:
    sender = Sender("gloo", "127.0.0.1", num_workers=1, timeout_s=60.0)
    process = worker(sender, weights, 1, turns=1)
    sender.send(weights)
    assert process.wait(60) == 0
    failed = threading.Event()

    def send_again() -> None:
        with pytest.raises(RuntimeError):
            sender.send(weights)
        failed.set()

    thread = threading.Thread(target=send_again, daemon=True)
    thread.start()
    assert failed.wait(60)


def test_nccl_without_a_gpu_says_what_to_do() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="areal-sub-gloo"):
        Sender("nccl", "127.0.0.1", num_workers=1, timeout_s=1.0)


def test_its_store_is_reached_from_nowhere_else() -> None:
    sender = Sender("gloo", "127.0.0.1", num_workers=1, timeout_s=1.0)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", sender._port), timeout=5)
