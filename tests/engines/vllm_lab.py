"""A small model that vLLM takes on a CPU, and a server with it: for tests of the real one."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engine_lab import EngineProcess, engine_process, prompt_of
from safetensors.torch import save_file

from areal_sub.engine_client import EngineClient
from areal_sub.records import WEIGHT_PROBE

MAX_MODEL_LEN = 4096
START_S = 900.0
UPDATE_S = 300.0
WORK_S = 600.0
# Attention heads of 32: vLLM's CPU kernels have none smaller.
CONFIG = transformers.LlamaConfig(
    vocab_size=97,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=96,
    max_position_embeddings=MAX_MODEL_LEN,
    initializer_range=0.4,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)


@contextmanager
def vllm_server(model_path: Path, *args: str, **settings: Any) -> Iterator[EngineProcess]:
    """Yields when it is up: minutes later, on a busy machine. `args`: more flags."""
    folder = Path(tempfile.mkdtemp(prefix="as-"))  # sockets need short names
    try:
        with engine_process(
            folder,
            "vllm",
            model_path=str(model_path),
            python=os.environ["AREAL_SUB_VLLM_PYTHON"],
            args=["--enforce-eager", *args],
            env={"VLLM_CPU_KVCACHE_SPACE": "1", **settings.pop("env", {})},
            max_running_requests=16,
            start_timeout_s=START_S,
            **settings,
        ) as engine:
            deadline = time.monotonic() + START_S
            while not engine.socket_path.exists():
                ended = engine.process.poll() is not None
                if ended or time.monotonic() > deadline:
                    pytest.fail((folder / "log").read_text()[-8000:])
                time.sleep(0.1)
            yield engine
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def logprobs_of(model: Any, prompt: Sequence[int], token_ids: Sequence[int]) -> list[float]:
    ids = torch.tensor([[*prompt, *token_ids]])
    scores = model(ids).logits[0].log_softmax(-1)
    return [float(scores[len(prompt) - 1 + i, t]) for i, t in enumerate(token_ids)]


def model_of(seed: int) -> Any:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def write_weights(model: Any, path: Path, **wrong: float) -> None:
    """`model`'s weights, as the learner leaves them for an engine."""
    ids = prompt_of(17)
    said = [value + wrong.get("off", 0.0) for value in logprobs_of(model, ids[:1], ids[1:])]
    probe = json.dumps({"token_ids": ids, "logprobs": said})
    state = model.state_dict()
    del state["lm_head.weight"]
    save_file(state, path, {WEIGHT_PROBE: probe})


async def put(client: EngineClient, model: Any, folder: Path, **wrong: float) -> int:
    """Give the engine `model`'s weights; their version."""
    version = (await client.info()).policy_version + 1
    path = folder / f"v{version}.safetensors"
    write_weights(model, path, **wrong)
    try:
        await client.update_weights(path, version, timeout_s=UPDATE_S)
    finally:
        path.unlink()
    return version
