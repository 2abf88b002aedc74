"""One run of a real agent: its environment, the policy, and what the journal says afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_run import REPO
from filelock import FileLock

from areal_sub.rollout.environments import cache_folder

# Real agents' prompts are longer than the calculator's, for which the policy was made.
MAX_POSITIONS = 32768


@pytest.fixture(scope="session")
def calculator_policy() -> Path:
    """The default run's policy after its warm start, which calls the tool and answers: made once,
    and kept beside the agents' environments."""
    sources = sorted((REPO / "examples/proxy").glob("*.*"))
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    folder = cache_folder(os.environ) / "policies" / f"calculator-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            made = folder.with_name(f".{folder.name}")
            shutil.rmtree(made, ignore_errors=True)
            code = (
                "import pathlib, sys\n"
                "from examples.proxy.warm_start import make\n"
                "make(pathlib.Path(sys.argv[1]), 1)\n"
            )
            subprocess.run([sys.executable, "-c", code, str(made)], check=True, cwd=REPO)
            path = made / "config.json"
            config = json.loads(path.read_text())
            path.write_text(json.dumps({**config, "max_position_embeddings": MAX_POSITIONS}))
            made.rename(folder)
    return folder


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A folder with a short name: paths of Unix sockets may have 107 bytes at most."""
    folder = Path(tempfile.mkdtemp(prefix="as-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
