"""Weights by broadcast into a real vLLM of two workers on the CPU: `make test-vllm`.

By gloo; nccl is the same but for the kind of group and where the tensors are.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from engine_lab import EngineProcess, generate, greedy_reference, joined, prompt_of, request_of
from vllm_lab import START_S, UPDATE_S, WORK_S, model_of, put, vllm_server

from areal_sub.engine_client import EngineClient
from areal_sub.records import GenerateChunk

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1000)]

PROMPT = prompt_of(10)


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    model_path = tmp_path_factory.mktemp("vllm-model")
    model_of(0).save_pretrained(model_path)
    flags = ["--weight-transfer-config", json.dumps({"backend": "areal-sub-gloo"})]
    first, second = [*sorted(os.sched_getaffinity(0)), 0][:2]
    cores = {"VLLM_CPU_OMP_THREADS_BIND": f"{first}|{second}"}  # of one NUMA node
    with vllm_server(
        model_path, *flags, "--tensor-parallel-size", "2", env=cores, update_timeout_s=UPDATE_S
    ) as engine:
        yield engine


def test_each_update_is_what_both_workers_compute_with(vllm: EngineProcess, tmp_path: Path) -> None:
    async def work(client: EngineClient) -> list[tuple[int, list[GenerateChunk]]]:
        seen = []
        for seed in (1, 2):
            version = await put(client, model_of(seed), tmp_path)
            seen.append((version, await generate(client, request_of(PROMPT, max_new_tokens=20))))
        return seen

    for seed, (version, chunks) in zip((1, 2), vllm.run(work, WORK_S), strict=True):
        assert joined(chunks, "token_ids") == greedy_reference(model_of(seed), PROMPT, 20)
        assert joined(chunks, "versions") == [version] * 20


def test_a_server_that_comes_back_gets_them_in_a_new_group(
    vllm: EngineProcess, tmp_path: Path
) -> None:
    async def work(client: EngineClient) -> list[GenerateChunk]:
        await put(client, model_of(3), tmp_path)
        (server,) = psutil.Process(vllm.process.pid).children()
        server.send_signal(signal.SIGKILL)
        return await asyncio.wait_for(generate(client, request_of(PROMPT)), START_S)

    (chunk,) = vllm.run(work, START_S)
    assert chunk.token_ids.tolist() == greedy_reference(model_of(3), PROMPT, 10)
