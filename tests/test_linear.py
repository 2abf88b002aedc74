"""Products by oneDNN: torch's own values and gradients, to rounding."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from areal_sub import linear


@pytest.fixture(autouse=True)
def _preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "is_faster", lambda: True)
    torch.manual_seed(0)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What oneDNN has multiplied."""
    made: list[Tensor] = []
    product: Callable[..., Tensor] = linear._product

    def record(*args: Any) -> Tensor:
        made.append(product(*args))
        return made[-1]

    monkeypatch.setattr(linear, "_product", record)
    return made


@pytest.mark.parametrize("shape", [(24,), (1, 24), (5, 24), (3, 7, 24)], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_values_and_gradients(shape: tuple[int, ...], has_bias: bool) -> None:
    rows = torch.randn(shape, requires_grad=True)
    weight = torch.randn(40, 24, requires_grad=True)
    inputs = [rows, weight, *([torch.randn(40, requires_grad=True)] if has_bias else [])]
    results = [
        (result := function(*inputs), torch.autograd.grad(result.square().sum(), inputs))
        for function in (linear.linear, F.linear)
    ]
    (value, gradients), (expected, expected_gradients) = results
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-4)


def test_only_what_needs_a_gradient_gets_one(products: list[Tensor]) -> None:
    rows, weight = torch.randn(5, 24, requires_grad=True), torch.randn(40, 24)
    linear.linear(rows, weight).sum().backward()
    assert rows.grad is not None
    assert len(products) == 2  # forward, and of the rows


def test_a_bias_alone_can_be_learned() -> None:
    bias = torch.zeros(40, requires_grad=True)
    linear.linear(torch.randn(5, 24), torch.randn(40, 24), bias).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((40,), 5.0))


def test_a_view_of_weights_and_rows_that_are_not_contiguous() -> None:
    whole = torch.randn(64, 24)
    rows = torch.randn(24, 9).t()
    torch.testing.assert_close(linear.linear(rows, whole[8:48]), F.linear(rows, whole[8:48]))


@pytest.mark.parametrize(
    ("rows", "weight"),
    [
        (torch.randn(5, 8, dtype=torch.bfloat16), torch.randn(4, 8, dtype=torch.bfloat16)),
        (torch.randn(5, 8, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)),
        (torch.randn(0, 8), torch.randn(4, 8)),
    ],
    ids=["bfloat16", "float64", "no rows"],
)
def test_others_are_torchs_own(products: list[Tensor], rows: Tensor, weight: Tensor) -> None:
    assert torch.equal(linear.linear(rows, weight), F.linear(rows, weight))
    assert not products


def test_autocast_stays_in_charge(products: list[Tensor]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear.linear(torch.randn(5, 8), torch.randn(4, 8)).dtype is torch.bfloat16
    assert not products


WITHOUT_MEMORY = """
import resource, torch
from areal_sub import linear
torch.set_num_threads(1)
weights = [torch.randn(64 + i, 64) for i in range(4000)]
rows = torch.randn(8, 64)
most = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + 2**16
resource.setrlimit(resource.RLIMIT_AS, (most, most))
kept = []
try:
    for weight in weights:
        kept.append(linear._product(rows, weight))
except (MemoryError, RuntimeError) as error:
    kept.clear()
    assert isinstance(error, MemoryError) or "allocate memory" in str(error), error
    print("said so")
"""


def test_without_memory_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MEMORY], capture_output=True, text=True, timeout=60
    )
    if done.returncode == -signal.SIGSEGV:
        pytest.skip(f"torch {torch.__version__} itself crashes where it gets no memory")
    assert done.stdout == "said so\n", done.stderr


def test_a_models_layers(products: list[Tensor]) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))
    rows = torch.randn(3, 8)
    expected, state = model(rows), model.state_dict()
    linear.use_in(model)
    torch.testing.assert_close(model(rows), expected)
    assert len(products) == 2
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
