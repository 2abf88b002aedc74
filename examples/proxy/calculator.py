"""The default run's tasks: "What is 7 * 8?" with operands 1 to 9, `+` and `*`; 162 in all.

Named in `config.yaml` as `train_dataset.path: examples.proxy.calculator:tasks`. A hash of the
problem holds 38 of them out for validation: neither training nor the warm start's demonstrations
have them. What is held out is the question: `8 * 7` may be trained where `7 * 8` is held out.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Any

Problem = tuple[int, str, int]


def problems(split: str) -> list[Problem]:
    """All problems of `split` ("train" or "valid"), in a fixed order."""
    if split not in ("train", "valid"):
        raise ValueError(f"there is no split {split!r}: 'train' and 'valid'")
    return [
        (a, op, b)
        for op in "+*"
        for a in range(1, 10)
        for b in range(1, 10)
        if _is_held_out(a, op, b) == (split == "valid")
    ]


def solve(problem: Problem) -> int:
    a, op, b = problem
    return a + b if op == "+" else a * b


def question(problem: Problem) -> str:
    a, op, b = problem
    return f"What is {a} {op} {b}?"


def tasks(*, split: str, seed: int, size: int | None = None) -> Iterator[dict[str, Any]]:
    """The split's tasks in an order drawn from `seed`; the first `size` of them where given."""
    chosen = problems(split)
    random.Random(seed).shuffle(chosen)
    for problem in chosen[:size]:
        a, op, b = problem
        yield {
            "task_id": f"{split}-{a}{op}{b}",
            "messages": [{"role": "user", "content": question(problem)}],
            "answer": str(solve(problem)),
        }


def _is_held_out(a: int, op: str, b: int) -> bool:
    return hashlib.sha256(f"{a} {op} {b}".encode()).digest()[0] % 5 == 0
