"""Fixtures of the engine's tests; what they make is in `engine_lab`, beside this file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

# Under `--import-mode=importlib` a test's own folder is not importable by itself.
sys.path.insert(0, str(Path(__file__).parent))

from engine_lab import EngineProcess, LocalDecoder, engine_process, make_model

# These need the extra `vllm` (`make test` installs all of them).
NEED_AIOHTTP = ["test_vllm_probe.py", "test_vllm_wire.py", "test_vllm_lora.py", "test_sglang.py"]
collect_ignore = [] if find_spec("aiohttp") else NEED_AIOHTTP


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied tiny Llama (seed 0)."""
    path = tmp_path_factory.mktemp("model")
    make_model("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def new_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the same model, seed 1, as one safetensors file."""
    path = tmp_path_factory.mktemp("weights")
    make_model("llama", seed=1).save_pretrained(path)
    return path / "model.safetensors"


@pytest.fixture
def decoders() -> Iterator[Callable[..., LocalDecoder]]:
    """Start decode threads that end with the test."""
    started: list[LocalDecoder] = []

    def start(model: Any, **limits: int) -> LocalDecoder:
        decoder = LocalDecoder(model, **limits)
        decoder.start()
        started.append(decoder)
        return decoder

    yield start
    for decoder in started:
        decoder.stop(10.0)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[EngineProcess]:
    """One engine for tests that leave its weights alone; four rows, `MAX_MODEL_LEN` tokens."""
    with engine_process(
        tmp_path_factory.mktemp("engine"), model_path=str(model_dir), max_running_requests=4
    ) as process:
        yield process
