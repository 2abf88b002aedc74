"""Float32 products of linear layers: oneDNN beside torch's own (MKL), forward and backward.

    python -m benchmarks.linear [--threads 1] [--rounds 30]

In turns, per shape; milliseconds (the fastest quarter's slowest) and their ratio. Many weights of
each shape take turns, so that none is found in a cache that a whole model would not fit in.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import cycle, product

import torch
import torch.nn.functional as F

from areal_sub.linear import _product, is_faster

SHAPES = [(128, 384), (576, 960), (576, 3072), (1536, 576), (576, 49152)]
CACHE_BYTES = 64 * 2**20


def times_ms(functions: list[Callable[[], object]], rounds: int) -> list[float]:
    taken: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds + 2):
        for function, times in zip(functions, taken, strict=True):
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
    return [sorted(times[2:])[rounds // 4] * 1e3 for times in taken]


def ways(num_rows: int, width: int, out: int) -> dict[str, list[Callable[[], object]]]:
    """By MKL and by oneDNN: forward, and both products of backward."""
    num_weights = max(1, CACHE_BYTES // (4 * width * out))
    turns = cycle(torch.randn(num_weights, out, width).unbind())
    rows, gradient = torch.randn(num_rows, width), torch.randn(num_rows, out)
    made: dict[str, list[Callable[[], object]]] = {
        "forward": [
            lambda: F.linear(rows, next(turns)),
            lambda: _product(rows, next(turns)),
        ]
    }
    if num_rows >= 64:  # the learner packs as many
        made["backward"] = [
            lambda: (gradient @ next(turns), gradient.t() @ rows),
            lambda: (_product(gradient, next(turns).t()), _product(gradient.t(), rows.t())),
        ]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"oneDNN is preferred on this processor: {is_faster()}")
    print(f"{'rows':>5} {'in':>5} {'out':>6}  {'':8} {'MKL ms':>9} {'oneDNN ms':>9} {'ratio':>6}")
    for num_rows, (width, out) in product((1, 16, 64, 512), SHAPES):
        for name, functions in ways(num_rows, width, out).items():
            mkl, onednn = times_ms(functions, arguments.rounds)
            print(
                f"{num_rows:5d} {width:5d} {out:6d}  {name:8} {mkl:9.3f} {onednn:9.3f} "
                f"{onednn / mkl:6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
