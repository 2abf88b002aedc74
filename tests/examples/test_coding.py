"""The coding example's grader: the repository's own tests decide, whatever the agent left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from examples.coding.grade import REPOSITORIES
from examples.coding.grade import tests_pass as grade

FIXED = {
    "totals": {"totals.py": b"def total(numbers):\n    return sum(numbers)\n"},
    "slug": {"slug.py": b"def slug(title):\n    return '-'.join(title.lower().split())\n"},
}
TASKS = [
    json.loads(line) for line in (REPOSITORIES.parent / "tasks.jsonl").read_text().splitlines()
]


def left_as_it_was(task: dict[str, Any]) -> dict[str, bytes]:
    folder = REPOSITORIES / task["repository"]
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task["repository"])
def test_a_repair_passes_and_the_fault_does_not(task: dict[str, Any]) -> None:
    before = left_as_it_was(task)
    assert grade(task, [], before, {}) == 0.0
    assert grade(task, [], before | FIXED[task["repository"]], {}) == 1.0


@pytest.mark.parametrize(
    "outputs",
    [
        {},
        {"totals.py": b"def total(numbers:"},
        {"totals.py": b"import os\nprint('ok')\nos._exit(0)\n"},
        {"totals.py": b"import sys\nsys.exit(0)\n"},
        {"totals.py": b"def total(numbers):\n    return 6\n"},
        {"totals.py": b"", "unittest.py": b"print(input())\nraise SystemExit\n"},
        # Its own tests are not asked.
        {"totals.py": b"def total(numbers):\n    return 0\n", "test_totals.py": b""},
        {"totals.py": b"def total(numbers):\n    return 0\n", "tests/test_more.py": b""},
    ],
)
def test_what_does_not_pass(outputs: dict[str, bytes], tmp_path: Path) -> None:
    assert grade(TASKS[0], [], outputs, {}) == 0.0
