"""Linear layers on processors that are not Intel's: float32 products by oneDNN in place of MKL.

torch multiplies float32 on a CPU with MKL, which takes a slow path on AMD's processors: on an EPYC
with AVX-512, oneDNN, which torch carries as well, took 0.4 to 0.55 of the time, forward and
backward, from one row to a thousand (`python -m benchmarks.linear`). What is called is what torch's
own compiler calls for it. Both sum in float32; they differ by rounding.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# All that oneDNN says where it gets no memory.
WITHOUT_MEMORY = ("could not create a primitive", "could not execute a primitive")


@cache
def is_faster() -> bool:
    """Whether oneDNN is to be preferred here."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `torch.nn.functional.linear`: [..., in] → [..., out]."""
    if not (_is_plain(rows) and _is_plain(weight) and is_faster()) or torch.is_autocast_enabled(
        "cpu"
    ):
        return F.linear(rows, weight, bias)
    inputs = (rows, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        result: Tensor = _Linear.apply(*inputs)  # type: ignore[no-untyped-call]
        return result
    return _product(rows, weight, bias)


def use_in(model: nn.Module) -> None:
    """All linear layers of `model` compute so from now on."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = _LinearLayer


class _LinearLayer(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def _is_plain(tensor: Tensor) -> bool:
    """Float32 in this process's memory, and no subclass that does things of its own."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype is torch.float32
        and tensor.device.type == "cpu"
        and tensor.numel() > 0
    )


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    try:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    except RuntimeError as error:
        if str(error).startswith(WITHOUT_MEMORY):
            raise MemoryError(f"no memory to multiply {tuple(rows.shape)} by oneDNN") from error
        raise
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return _product(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        of_rows = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_rows = _product(flat, weight.t()).view(rows.shape)
        if ctx.needs_input_grad[1]:
            of_weight = _product(flat.t(), rows.reshape(-1, rows.shape[-1]).t())
        if ctx.needs_input_grad[2]:
            of_bias = flat.sum(0)
        return of_rows, of_weight, of_bias
