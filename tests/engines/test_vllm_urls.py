"""A real vLLM that runs already, was started by someone else, and knows nothing of our plugin:
`engine.vllm.urls` with vLLM's own way of taking weights. Part of `make test-vllm`."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engine_lab import engine_process, greedy_reference, prompt_of, request_of
from safetensors.torch import save_file

from areal_sub.engine_client import EngineClient
from areal_sub.engines.vllm.api import Api
from areal_sub.engines.vllm.probe import probe
from areal_sub.errors import ConfigError

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1000)]

START_S = 900.0
WORK_S = 600.0
MAX_MODEL_LEN = 256
CONFIG = transformers.LlamaConfig(
    vocab_size=97,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=96,
    max_position_embeddings=MAX_MODEL_LEN,
    initializer_range=0.4,
    # On a CPU vLLM's own reload leaves a tied output embedding as it was (docs/vllm.md).
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)


def model_of(seed: int) -> Any:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with weights of its own (seed 0)."""
    folder = tmp_path_factory.mktemp("server")
    model_of(0).save_pretrained(folder / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(os.environ["AREAL_SUB_VLLM_PYTHON"], "-m", "vllm.entrypoints.openai.api_server"),
        *("--host", "127.0.0.1", "--port", str(port), "--model", str(folder / "model")),
        *("--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "8"),
        *("--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"),
        *("--skip-tokenizer-init", "--enforce-eager", "--enable-scale-out"),
    ]
    env = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + START_S
            while not _answers(f"http://127.0.0.1:{port}/health"):
                if server.poll() is not None or time.monotonic() > deadline:
                    pytest.fail((folder / "log").read_text()[-8000:])
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_a_running_server_gets_the_runs_weights_and_takes_updates(url: str, tmp_path: Path) -> None:
    prompts = [prompt_of(5 + 9 * i, salt=i) for i in range(3)]
    model_of(1).save_pretrained(tmp_path / "model")  # not what the server has
    new = tmp_path / "v1.safetensors"
    save_file(model_of(2).state_dict(), new)

    async def work(client: EngineClient) -> list[tuple[list[int], set[int]]]:
        seen = []

        async def one(prompt: list[int], stream: bool) -> None:
            request = request_of(prompt, max_new_tokens=12, stream=stream)
            chunks = [chunk async for chunk in client.generate(request)]
            tokens = [t for chunk in chunks for t in chunk.token_ids.tolist()]
            seen.append((tokens, {v for chunk in chunks for v in chunk.versions.tolist()}))

        for prompt in prompts:
            await one(prompt, stream=True)
        await client.update_weights(new, 1, timeout_s=300)
        for prompt in prompts:
            await one(prompt, stream=False)
        return seen

    folder = Path(tempfile.mkdtemp(prefix="as-"))  # sockets need short names
    try:
        with engine_process(
            folder, "vllm", model_path=str(tmp_path / "model"), urls=[url], update_timeout_s=300.0
        ) as engine:
            seen = engine.run(work, WORK_S)
        assert "without areal-sub's weight-transfer backend" in (folder / "log").read_text()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    want = [
        (greedy_reference(model_of(seed), prompt, 12), {version})
        for seed, version in ((1, 0), (2, 1))
        for prompt in prompts
    ]
    assert seen == want


def test_a_real_server_that_is_too_short_is_told_its_flag(url: str) -> None:
    async def main() -> None:
        api = Api.at_url(url)
        try:
            await probe(api, max_model_len=MAX_MODEL_LEN + 1)
        finally:
            await api.close()

    with pytest.raises(ConfigError, match=f"--max-model-len {MAX_MODEL_LEN + 1}"):
        asyncio.run(main())
