"""Real vLLM on the CPU with a tiny model, through our engine process: `make test-vllm`.

One server serves all of these tests. Each puts weights of its own into it first, so their order
does not matter.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from engine_lab import (
    EngineProcess,
    generate,
    greedy_reference,
    joined,
    prompt_of,
    request_of,
)
from safetensors.torch import save_file
from vllm_lab import (
    MAX_MODEL_LEN,
    START_S,
    UPDATE_S,
    WORK_S,
    logprobs_of,
    model_of,
    put,
    vllm_server,
    write_weights,
)

from areal_sub.engine_client import EngineClient
from areal_sub.errors import GrammarError, RpcError
from areal_sub.records import GenerateChunk, extend_digest, int32

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1000)]


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    model_path = tmp_path_factory.mktemp("vllm-model")
    model_of(0).save_pretrained(model_path)
    with vllm_server(model_path, update_timeout_s=UPDATE_S) as engine:
        yield engine


def check_exact(prompt: Sequence[int], chunks: Sequence[GenerateChunk]) -> None:
    """The digests are of this prompt and these tokens."""
    token_ids = joined(chunks, "token_ids")
    want = [extend_digest(0, int32([*prompt, *token_ids[: i + 1]])) for i in range(len(token_ids))]
    assert joined(chunks, "digests") == want


def test_greedy_before_and_after_an_update_is_what_transformers_gives(
    vllm: EngineProcess, tmp_path: Path
) -> None:
    prompts = [prompt_of(5 + 9 * i, salt=i) for i in range(6)]

    async def work(client: EngineClient) -> list[tuple[Any, int, list[list[GenerateChunk]]]]:
        seen = []
        for seed in (0, 1):
            model = model_of(seed)
            version = await put(client, model, tmp_path)
            requests = [
                request_of(p, max_new_tokens=20, stream=i % 2 == 0) for i, p in enumerate(prompts)
            ]
            answers = await asyncio.gather(*(generate(client, r) for r in requests))
            seen.append((model, version, answers))
        return seen

    differences = []
    for model, version, answers in vllm.run(work, WORK_S):
        for prompt, chunks in zip(prompts, answers, strict=True):
            token_ids = joined(chunks, "token_ids")
            assert token_ids == greedy_reference(model, prompt, 20)
            assert joined(chunks, "versions") == [version] * 20
            assert chunks[-1].finish_reason == "length"
            check_exact(prompt, chunks)
            want = logprobs_of(model, prompt, token_ids)
            differences += [
                abs(a - b) for a, b in zip(joined(chunks, "logprobs"), want, strict=True)
            ]
    print(f"sampler/learner |Δ logprob|: mean {sum(differences) / len(differences):.2g}")
    assert max(differences) < 1e-3


def test_sampled_logprobs_are_of_the_distribution_sampled_from(
    vllm: EngineProcess, tmp_path: Path
) -> None:
    model, prompt = model_of(2), prompt_of(12)

    async def work(client: EngineClient) -> list[GenerateChunk]:
        await put(client, model, tmp_path)
        return await generate(client, request_of(prompt, temperature=0.7, max_new_tokens=40))

    (chunk,) = vllm.run(work, WORK_S)
    ids = torch.tensor([[*prompt, *chunk.token_ids.tolist()]])
    scores = (model(ids).logits[0] / 0.7).log_softmax(-1)
    want = scores[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]
    assert torch.allclose(torch.tensor(chunk.logprobs), want, atol=1e-3)


def test_a_stop_token_ends_the_request_and_is_included(vllm: EngineProcess, tmp_path: Path) -> None:
    model, prompt = model_of(3), prompt_of(20)
    want = greedy_reference(model, prompt, 30)
    stop = want[5]

    async def work(client: EngineClient) -> list[GenerateChunk]:
        await put(client, model, tmp_path)
        return await generate(client, request_of(prompt, max_new_tokens=30, stop_token_ids=[stop]))

    (chunk,) = vllm.run(work, WORK_S)
    assert chunk.finish_reason == "stop"
    assert chunk.token_ids.tolist() == want[: want.index(stop) + 1]


@pytest.mark.parametrize("stream", [True, False])
def test_requests_in_flight_over_an_update_finish_with_both_versions(
    vllm: EngineProcess, tmp_path: Path, stream: bool
) -> None:
    prompts = [prompt_of(8, salt=i) for i in range(4)]

    async def update_under_way(client: EngineClient) -> tuple[int, list[list[GenerateChunk]]]:
        version = await put(client, model_of(4), tmp_path) + 1
        write_weights(model_of(5), path := tmp_path / "next.safetensors")  # at hand, once they run
        long = {"temperature": 1.0, "max_new_tokens": MAX_MODEL_LEN - 8}
        begun = [asyncio.Event() for _ in prompts]

        async def read(
            prompt: list[int], has_begun: asyncio.Event, stream: bool
        ) -> list[GenerateChunk]:
            chunks = []
            async for chunk in client.generate(request_of(prompt, stream=stream, **long)):
                chunks.append(chunk)
                if len(chunks) == 20:  # it is being decoded by now, and for long
                    has_begun.set()
            return chunks

        calls = [
            asyncio.ensure_future(read(p, event, stream))
            for p, event in zip(prompts, begun, strict=True)
        ]
        if not stream:  # what is sent after them, and streams, has begun after them
            begun = [asyncio.Event()]
            # It is read to its end: who lags holds up the others of its connection.
            calls.append(asyncio.ensure_future(read(prompt_of(9), begun[0], stream=True)))
        await asyncio.gather(*(event.wait() for event in begun))
        await client.update_weights(path, version, timeout_s=UPDATE_S)
        return version, (await asyncio.gather(*calls))[: len(prompts)]

    async def work(client: EngineClient) -> tuple[int, list[list[GenerateChunk]]]:
        for _ in range(5):  # on a busy machine they may have ended before the update was asked for
            version, answers = await update_under_way(client)
            if all(version in joined(chunks, "versions") for chunks in answers):
                break
        return version, answers

    new, answers = vllm.run(work, WORK_S)
    for prompt, chunks in zip(prompts, answers, strict=True):
        versions = joined(chunks, "versions")
        assert len(versions) == MAX_MODEL_LEN - 8
        assert set(versions) == {new - 1, new} and versions == sorted(versions)
        check_exact(prompt, chunks)
        switch = versions.index(new)
        # Each token's logprob is of the weights that its version names (what was cached before
        # the update stays in use, so only the old ones can be computed again here).
        want = logprobs_of(model_of(4), prompt, joined(chunks, "token_ids")[:switch])
        got = joined(chunks, "logprobs")[:switch]
        assert max(abs(a - b) for a, b in zip(got, want, strict=True)) < 1e-3


def test_without_a_tokenizer_a_grammar_is_refused(vllm: EngineProcess) -> None:
    async def work(client: EngineClient) -> None:
        with pytest.raises(GrammarError, match="requires a tokenizer"):
            await generate(client, request_of(prompt_of(5), grammar="start: <[1]>"))

    vllm.run(work, WORK_S)


def test_weights_that_do_not_fit_are_refused_and_the_old_ones_stay(
    vllm: EngineProcess, tmp_path: Path
) -> None:
    model, prompt = model_of(6), prompt_of(10)
    path = tmp_path / "wrong.safetensors"
    save_file({"model.norm.weight": torch.ones(3)}, path)

    async def work(client: EngineClient) -> list[GenerateChunk]:
        version = await put(client, model, tmp_path)
        with pytest.raises(RpcError, match=r"missing model\.embed_tokens\.weight"):
            await client.update_weights(path, version + 1, timeout_s=UPDATE_S)
        return await generate(client, request_of(prompt))

    (chunk,) = vllm.run(work, WORK_S)
    assert chunk.token_ids.tolist() == greedy_reference(model, prompt, 10)


def test_an_engine_that_computes_something_else_is_found_out(
    vllm: EngineProcess, tmp_path: Path
) -> None:
    async def work(client: EngineClient) -> None:
        with pytest.raises(RpcError, match="does not compute what the learner computes"):
            await put(client, model_of(7), tmp_path, off=0.01)

    vllm.run(work, WORK_S)


def test_a_killed_server_comes_back_with_current_weights_and_requests_go_on(
    vllm: EngineProcess, tmp_path: Path
) -> None:
    model, prompt = model_of(8), prompt_of(10)
    num_tokens = 500

    async def work(client: EngineClient) -> tuple[int, list[GenerateChunk], list[GenerateChunk]]:
        version = await put(client, model, tmp_path)
        whole = asyncio.ensure_future(generate(client, request_of(prompt, max_new_tokens=30)))
        streamed = []
        long = request_of(prompt, stream=True, max_new_tokens=num_tokens)
        async with aclosing(client.generate(long)) as chunks:
            async for chunk in chunks:
                streamed.append(chunk)
                if len(streamed) == 5:
                    (server,) = psutil.Process(vllm.process.pid).children()
                    server.send_signal(signal.SIGKILL)
        return version, streamed, await whole

    version, streamed, whole = vllm.run(work, START_S)
    want = greedy_reference(model, prompt, num_tokens)
    assert joined(streamed, "token_ids") == want
    assert joined(whole, "token_ids") == want[:30]
    assert set(joined(streamed, "versions")) == {version}
    check_exact(prompt, streamed)
