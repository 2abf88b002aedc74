"""One run of a real agent: its environment, the policy, and what the journal says afterwards."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e_run import REPO, Run
from filelock import FileLock

from areal_sub.rollout.environments import cache_folder

# Real agents' prompts are longer than the calculator's, for which the policy was made.
MAX_POSITIONS = 32768


CALCULATOR = """\
import json, pathlib, sys
from examples.proxy.warm_start import make
folder = pathlib.Path(sys.argv[1])
make(folder, 1)
config = json.loads((folder / "config.json").read_text())
config["max_position_embeddings"] = int(sys.argv[2])
(folder / "config.json").write_text(json.dumps(config))
"""
MAKERS = {
    # The default run's after its warm start, which calls the tool and answers.
    "calculator": (["-c", CALCULATOR], "examples/proxy/*.*"),
    # Knows nothing.
    "prose": (["tests/agents/make_policy.py"], "tests/agents/make_policy.py"),
}


@pytest.fixture(scope="session")
def policies() -> Callable[[str], Path]:
    """A policy by name, made once and kept beside the agents' environments."""

    def policy(name: str) -> Path:
        command, sources = MAKERS[name]
        content = b"".join(path.read_bytes() for path in sorted(REPO.glob(sources)))
        key = hashlib.sha256(content + repr(command).encode()).hexdigest()[:16]
        folder = cache_folder(os.environ) / "policies" / f"{name}-{key}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                made = folder.with_name(f".{folder.name}")
                shutil.rmtree(made, ignore_errors=True)
                words = [sys.executable, *command, str(made), str(MAX_POSITIONS)]
                subprocess.run(words, check=True, cwd=REPO)
                made.rename(folder)
        return folder

    return policy


@pytest.fixture
def runs() -> Iterator[Callable[..., Run]]:
    """Starts runs; those that still run at the end are ended, and what they wrote is removed."""
    # A folder with a short name: paths of Unix sockets may have 107 bytes at most.
    folder = Path(tempfile.mkdtemp(prefix="as-"))
    running: list[Run] = []

    def start(*words: Any, **how: Any) -> Run:
        running.append(Run(folder, *words, **how))
        return running[-1]

    yield start
    for run in running:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()
    shutil.rmtree(folder, ignore_errors=True)
