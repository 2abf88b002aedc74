"""Real runs: `areal-sub train` in a process of its own, over a policy of random weights."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from e2e_run import REPO, Run
from filelock import FileLock


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default run's model and tokenizer with its weights as they are before any training.

    Made once for all test processes.
    """
    folder = tmp_path_factory.getbasetemp().parent / "policy"
    with FileLock(str(folder) + ".lock"):
        if not folder.exists():
            code = (
                "import sys, random, torch\n"
                "from examples.proxy.warm_start import new_model, train_tokenizer\n"
                "torch.manual_seed(0)\n"
                "tokenizer = train_tokenizer(random.Random(0))\n"
                "new_model(tokenizer).save_pretrained(sys.argv[1])\n"
                "tokenizer.save_pretrained(sys.argv[1])\n"
            )
            subprocess.run([sys.executable, "-c", code, str(folder)], check=True, cwd=REPO)
    return folder


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A folder with a short name: paths of Unix sockets may have 107 bytes at most."""
    folder = Path(tempfile.mkdtemp(prefix="as-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def start_run(short_tmp: Path, policy: Path) -> Iterator[object]:
    runs: list[Run] = []

    def start(*overrides: str, variables: Mapping[str, str] | None = None) -> Run:
        runs.append(Run(short_tmp, policy, *overrides, variables=variables))
        return runs[-1]

    yield start
    for run in runs:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()
