"""The file of new weights: what safetensors reads in it, and whose memory it is written over."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from areal_sub.learner.weights_file import ALIGNMENT, leave, write_weights

WEIGHTS = {
    "odd": torch.tensor([1, 2, 3], dtype=torch.int8),
    "matrix": torch.arange(64.0).reshape(4, 16),
    "half": torch.arange(32, dtype=torch.bfloat16),
    "scalar": torch.tensor(7),
    "mask": torch.tensor([True, False, True]),
    "none": torch.zeros(0, 3),
    "another": torch.arange(16.0),
}


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "v1.safetensors"
    write_weights(path, WEIGHTS, {"some key": "ä\n"})
    read = load_file(path)
    assert read.keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"some key": "ä\n"}


def test_tensors_begin_where_they_are_copied_best(tmp_path: Path) -> None:
    path = tmp_path / "v1.safetensors"
    write_weights(path, WEIGHTS, {"length": "odd"})
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    assert (8 + size) % ALIGNMENT == 0
    for name in ("matrix", "half", "another"):
        assert header[name]["data_offsets"][0] % ALIGNMENT == 0


def written_over(tmp_path: Path, weights: dict[str, torch.Tensor], keep: Path | None) -> bool:
    """Whether a file that was left, and then is `keep` of somebody, is what the next one is in."""
    first, second = tmp_path / "v1.safetensors", tmp_path / "v2.safetensors"
    inode = first.stat().st_ino
    if keep is not None:
        os.link(first, keep)
    leave(first)
    write_weights(second, weights, {})
    assert not first.exists()
    for name, tensor in load_file(second).items():
        assert torch.equal(tensor, weights[name])
    return second.stat().st_ino == inode


def test_a_file_that_was_left_is_written_over(tmp_path: Path) -> None:
    large = {"w": torch.ones(5000)}
    write_weights(tmp_path / "v1.safetensors", large, {})
    assert written_over(tmp_path, WEIGHTS, keep=None)  # also one that was longer
    leave(tmp_path / "v2.safetensors")
    leave(tmp_path / "v2.safetensors")  # it is gone
    write_weights(tmp_path / "v3.safetensors", large, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v3.safetensors"]


def opened(path: Path) -> AbstractContextManager[object]:
    return path.open("rb")


def mapped(path: Path) -> AbstractContextManager[object]:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)


@pytest.mark.parametrize("held", [opened, mapped])
def test_what_somebody_still_reads_is_his(
    tmp_path: Path, held: Callable[[Path], AbstractContextManager[object]]
) -> None:
    path = tmp_path / "v1.safetensors"
    write_weights(path, {"w": torch.ones(5000)}, {})
    before = path.read_bytes()
    with held(path) as theirs:
        assert not written_over(tmp_path, WEIGHTS, keep=None)
        assert theirs.read() == before  # type: ignore[attr-defined]


def test_what_has_another_name_is_kept(tmp_path: Path) -> None:
    path, keep = tmp_path / "v1.safetensors", tmp_path / "kept"
    write_weights(path, {"w": torch.ones(5000)}, {})
    before = path.read_bytes()
    assert not written_over(tmp_path, WEIGHTS, keep=keep)
    assert keep.read_bytes() == before
