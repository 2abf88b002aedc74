"""SCRATCH by the lead to unblock integration: helper 5 replaces this whole file (keep these names)."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Task:
    task_id: str
    data: dict[str, Any]


def load_tasks(config, *, seed):
    if ":" in config.path:
        import importlib

        m, f = config.path.split(":")
        rows = list(
            getattr(importlib.import_module(m), f)(
                split=config.split, seed=seed, size=config.size, **config.dataset_kwargs
            )
        )
    else:
        rows = [json.loads(l) for l in Path(config.path).read_text().splitlines()]
    return tasks_from_rows(rows, name=config.path)


def tasks_from_rows(rows, *, name):
    return [Task(f"{name}-{i}", r) for i, r in enumerate(rows)]


class TaskOrder:
    def __init__(self, num_tasks, *, seed, shuffle, position):
        self.n, self.seed, self.shuffle, self.position = num_tasks, seed, shuffle, position

    def __iter__(self):
        p = self.position
        while True:
            e, i = divmod(p, self.n)
            order = list(range(self.n))
            if self.shuffle:
                random.Random(f"{self.seed}-{e}").shuffle(order)
            yield order[i]
            p += 1
