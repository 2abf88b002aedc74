"""LoRA adapters in a real vLLM on the CPU, through our engine process: `make test-vllm`.

One server serves all of these tests. Each puts an adapter of its own into it first, so their order
does not matter.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import torch
import transformers
from engine_lab import (
    EngineProcess,
    generate,
    greedy_reference,
    joined,
    prompt_of,
    request_of,
)
from safetensors.torch import load_file, save_file
from vllm_lab import CONFIG, MAX_MODEL_LEN, START_S, UPDATE_S, WORK_S, logprobs_of, vllm_server

from areal_sub.config.schema import ActorConfig
from areal_sub.engine_client import EngineClient
from areal_sub.errors import RpcError
from areal_sub.learner.learner import Learner
from areal_sub.records import WEIGHT_ADAPTER, WEIGHT_PROBE, GenerateChunk

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1000)]

RANK = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm-base")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(CONFIG).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vllm(base: Path) -> Iterator[EngineProcess]:
    own = {"lora_rank": RANK, "policy_version": -1, "update_timeout_s": 100.0}
    with vllm_server(base, **own) as engine:
        yield engine


@pytest.fixture
def learner(base: Path) -> Learner:
    actor = {
        "path": str(base), "dtype": "float32", "device": "cpu", "lora": {"rank": RANK, "alpha": 8},
    }  # fmt: skip
    return Learner.load(
        ActorConfig.model_validate(actor), path=str(base), temperature=1.0, total_steps=1, seed=1
    )


def become(learner: Learner, seed: int) -> Any:
    """Give the learner's adapter new weights; the merged model, by transformers alone."""
    torch.manual_seed(seed)
    for group in learner.optimizer.param_groups:
        for weights in group["params"]:
            torch.nn.init.normal_(weights, std=0.2)
    model = transformers.LlamaForCausalLM(CONFIG)
    model.load_state_dict(learner._policy.weights(torch.float32), strict=False)
    return model.eval().requires_grad_(False)


async def put(client: EngineClient, learner: Learner, folder: Path) -> int:
    """Give the engine the learner's adapter; its version."""
    version = (await client.info()).policy_version + 1
    path = folder / f"v{version}.safetensors"
    learner.export_adapter(path, "float32")
    try:
        await client.update_weights(path, version, timeout_s=UPDATE_S)
    finally:
        path.unlink()
    return version


async def served(vllm: EngineProcess) -> set[str]:
    """Version of each adapter that the server has, or the base's name."""
    socket = str(vllm.socket_path.with_suffix(".vllm"))
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(socket)) as session,
        session.get("http://vllm/v1/models") as answer,
    ):
        return {model["id"].rpartition("-")[2] for model in (await answer.json())["data"]}


def folders(folder: Path) -> set[str]:
    return {path.name.rpartition("-")[2] for path in folder.glob(".*-adapter-*")}


def test_adapters_give_what_the_learner_computes(
    vllm: EngineProcess, learner: Learner, tmp_path: Path
) -> None:
    """Greedy and sampled, streamed and not, of a fresh adapter (the base) and of two others."""
    prompts = [prompt_of(5 + 9 * i, salt=i) for i in range(4)]
    before = transformers.LlamaForCausalLM.from_pretrained(learner._actor.path)
    before.eval().requires_grad_(False)

    async def work(client: EngineClient) -> list[tuple[Any, int, list[list[GenerateChunk]]]]:
        seen = []
        for seed in (None, 1, 2):
            model = before if seed is None else become(learner, seed)
            version = await put(client, learner, tmp_path)
            requests = [
                request_of(p, max_new_tokens=20, stream=i % 2 == 0, temperature=float(i > 1))
                for i, p in enumerate(prompts)
            ]
            answers = await asyncio.gather(*(generate(client, r) for r in requests))
            seen.append((model, version, answers))
        return seen

    differences = []
    outputs = []
    for model, version, answers in vllm.run(work, WORK_S):
        outputs.append(joined(answers[0], "token_ids"))
        for i, (prompt, chunks) in enumerate(zip(prompts, answers, strict=True)):
            token_ids = joined(chunks, "token_ids")
            if i <= 1:
                assert token_ids == greedy_reference(model, prompt, 20)
            assert joined(chunks, "versions") == [version] * 20
            want = logprobs_of(model, prompt, token_ids)
            differences += [
                abs(a - b) for a, b in zip(joined(chunks, "logprobs"), want, strict=True)
            ]
    assert len({tuple(output) for output in outputs}) == 3, "the adapters made no difference"
    print(f"sampler/learner |Δ logprob|: mean {sum(differences) / len(differences):.2g}")
    assert max(differences) < 1e-3


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_in_flight_ends_with_the_adapter_that_it_began_with(
    vllm: EngineProcess, learner: Learner, tmp_path: Path, stream: bool
) -> None:
    prompt, num_tokens = prompt_of(8), MAX_MODEL_LEN - 8

    async def work(client: EngineClient) -> Any:
        first = become(learner, 3)
        version = await put(client, learner, tmp_path)
        # What earlier tests left is done with.
        assert await served(vllm) - {"policy"} == folders(tmp_path) == {str(version)}
        second = become(learner, 4)
        learner.export_adapter(path := tmp_path / "next.safetensors", "float32")  # at hand
        long = request_of(prompt, stream=stream, temperature=1.0, max_new_tokens=num_tokens)
        call = asyncio.ensure_future(generate(client, long))
        witness = request_of(prompt_of(9), stream=True, max_new_tokens=MAX_MODEL_LEN - 9)
        async with aclosing(client.generate(witness)) as chunks:
            for _ in range(20):  # both are being decoded by now, and for long
                await anext(chunks)
            await client.update_weights(path, version + 1, timeout_s=UPDATE_S)
        # Not while the witness is unread: what waits to be read holds up its connection.
        new = await generate(client, request_of(prompt, max_new_tokens=20))
        assert not call.done()
        assert await served(vllm) - {"policy"} == {str(version), str(version + 1)}
        chunks = await call
        become(learner, 5)
        await put(client, learner, tmp_path)
        assert await served(vllm) - {"policy"} == folders(tmp_path) == {str(version + 2)}
        return first, second, version, chunks, new

    first, second, version, chunks, new = vllm.run(work, WORK_S)
    assert joined(chunks, "versions") == [version] * num_tokens
    token_ids = joined(chunks, "token_ids")
    want = logprobs_of(first, prompt, token_ids)
    got = joined(chunks, "logprobs")
    assert max(abs(a - b) for a, b in zip(got, want, strict=True)) < 1e-3
    assert joined(new, "versions") == [version + 1] * 20
    assert joined(new, "token_ids") == greedy_reference(second, prompt, 20)


def test_what_is_wrong_is_refused_and_the_old_adapter_stays(
    vllm: EngineProcess, learner: Learner, tmp_path: Path
) -> None:
    prompt = prompt_of(10)

    async def work(client: EngineClient) -> Any:
        model = become(learner, 6)
        version = await put(client, learner, tmp_path)
        become(learner, 7)
        learner.export_adapter(path := tmp_path / "next.safetensors", "float32")
        tensors = load_file(path)
        ids, said = learner._policy.probe()
        settings = learner._policy.adapter.settings()  # type: ignore[union-attr]
        for message, changed, off, text in (
            (
                "unexpected base_model.model.nowhere",
                {"base_model.model.nowhere": None},
                0,
                settings,
            ),
            ("does not compute what the learner", {}, 0.1, settings),
            ("was refused", {}, 0, settings.replace('"use_dora": false', '"use_dora": true')),
        ):
            odd = {**tensors, **{name: torch.zeros(3) for name in changed}}
            probe = json.dumps({"token_ids": ids, "logprobs": [value + off for value in said]})
            save_file(odd, path, {WEIGHT_ADAPTER: text, WEIGHT_PROBE: probe})
            with pytest.raises(RpcError, match=message):
                await client.update_weights(path, version + 1, timeout_s=UPDATE_S)
            assert (await client.info()).policy_version == version
            assert await served(vllm) - {"policy"} == folders(tmp_path) == {str(version)}
        return model, version, await generate(client, request_of(prompt))

    model, version, chunks = vllm.run(work, WORK_S)
    assert joined(chunks, "token_ids") == greedy_reference(model, prompt, 10)
    assert joined(chunks, "versions") == [version] * 10


def test_a_killed_server_comes_back_with_the_current_adapter(
    vllm: EngineProcess, learner: Learner, tmp_path: Path
) -> None:
    prompt, num_tokens = prompt_of(10), 300

    async def work(client: EngineClient) -> Any:
        model = become(learner, 8)
        version = await put(client, learner, tmp_path)
        streamed = []
        long = request_of(prompt, stream=True, max_new_tokens=num_tokens)
        async with aclosing(client.generate(long)) as chunks:
            async for chunk in chunks:
                streamed.append(chunk)
                if len(streamed) == 5:
                    (server,) = psutil.Process(vllm.process.pid).children()
                    server.send_signal(signal.SIGKILL)
        return model, version, streamed

    model, version, streamed = vllm.run(work, START_S)
    assert joined(streamed, "token_ids") == greedy_reference(model, prompt, num_tokens)
    assert set(joined(streamed, "versions")) == {version}
