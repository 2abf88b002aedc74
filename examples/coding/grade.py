"""The grader of the coding example: do the repository's tests pass on the files as the agent left
them?

It takes the tests from the repository, and not from the agent's copy, which may say anything. The
code under test is the agent's all the same, and runs in the process that runs its tests: in the
grader's sandbox, where it can forge the reward of its own rollout and nothing else. That takes code
that knows this file; where a policy has reason to learn such tricks, compare outputs instead.
"""

from __future__ import annotations

import secrets
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORIES = Path(__file__).parent / "repositories"
TIMEOUT_S = 30.0
# Says so on the last line, with a word that is only known once all tests have run.
RUN = """\
import sys, unittest
word = sys.stdin.readline().strip()
result = unittest.TextTestRunner(sys.stderr).run(unittest.defaultTestLoader.discover("."))
passed = result.testsRun > 0 and result.wasSuccessful()
print(word if passed else "failed", flush=True)
"""


def tests_pass(
    task: Mapping[str, Any],
    transcript: Sequence[Mapping[str, Any]],
    outputs: Mapping[str, bytes],
    report: Mapping[str, Any],
) -> float:
    """1.0 where all tests pass, else 0.0."""
    repository = REPOSITORIES / task["repository"]
    with tempfile.TemporaryDirectory() as folder:
        for path, content in files_under_test(repository, outputs).items():
            (Path(folder) / path).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / path).write_bytes(content)
        return float(passes(Path(folder)))


def files_under_test(repository: Path, outputs: Mapping[str, bytes]) -> dict[str, bytes]:
    """What the agent left of the program, and the repository's own tests."""
    files = {path: content for path, content in outputs.items() if not _is_test(Path(path))}
    for path in sorted(repository.rglob("*.py")):
        if _is_test(path):
            files[str(path.relative_to(repository))] = path.read_bytes()
    return files


def passes(folder: Path) -> bool:
    word = secrets.token_hex(16)
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-B", "-c", RUN],
            cwd=folder,
            input=f"{word}\n",
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.stdout.rstrip().endswith(f"\n{word}") or done.stdout.strip() == word


def _is_test(path: Path) -> bool:
    return path.name.startswith("test")
