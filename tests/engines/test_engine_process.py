"""The engine's real process, over its real socket, through the real client."""

from __future__ import annotations

import asyncio
import signal
from contextlib import aclosing
from pathlib import Path

import pytest
from engine_lab import (
    MAX_MODEL_LEN,
    VOCAB,
    EngineProcess,
    engine_process,
    generate,
    greedy_reference,
    make_model,
    prompt_of,
    request_of,
)

from areal_sub.engine_client import EngineClient
from areal_sub.engines.embedded.server import serve
from areal_sub.errors import ModelError, PeerGone, RpcError
from areal_sub.records import EngineInfo, GenerateChunk, GenerateRequest


async def until(client: EngineClient, *, running: int, waiting: int = 0) -> EngineInfo:
    while True:
        info = await client.info()
        if (info.num_running, info.num_waiting) == (running, waiting):
            return info


def test_concurrent_requests_give_what_transformers_gives(engine: EngineProcess) -> None:
    prompts = [prompt_of(4 + 7 * i, salt=i) for i in range(8)]  # twice as many as there are rows

    async def work(client: EngineClient) -> list[list[GenerateChunk]]:
        requests = [
            request_of(p, max_new_tokens=12, stream=i % 2 == 0) for i, p in enumerate(prompts)
        ]
        return await asyncio.gather(*(generate(client, r) for r in requests))

    model = make_model("llama")
    for i, (prompt, chunks) in enumerate(zip(prompts, engine.run(work), strict=True)):
        token_ids = [int(t) for chunk in chunks for t in chunk.token_ids]
        assert token_ids == greedy_reference(model, prompt, 12)
        assert [c.finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
        assert all(len(c.token_ids) == len(c.logprobs) == len(c.versions) for c in chunks)
        assert len(chunks) > 1 if i % 2 == 0 else len(chunks) == 1


def test_it_says_what_it_is(engine: EngineProcess) -> None:
    info = engine.run(lambda client: client.info())
    assert (info.policy_version, info.max_model_len, info.vocab_size, info.num_slots) == (
        0,
        MAX_MODEL_LEN,
        VOCAB,
        4,
    )


def test_a_stop_token_ends_the_request_and_is_included(engine: EngineProcess) -> None:
    want = greedy_reference(make_model("llama"), prompt_of(20), 30)
    stop = want[5]
    request = request_of(prompt_of(20), max_new_tokens=30, stop_token_ids=[stop])
    (chunk,) = engine.run(lambda client: generate(client, request))
    assert chunk.finish_reason == "stop"
    assert chunk.token_ids.tolist() == want[: want.index(stop) + 1]


def test_a_request_ends_at_the_models_length(engine: EngineProcess) -> None:
    request = request_of(prompt_of(MAX_MODEL_LEN - 3), max_new_tokens=1000)
    (chunk,) = engine.run(lambda client: generate(client, request))
    assert (len(chunk.token_ids), chunk.finish_reason) == (3, "length")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (request_of(prompt_of(MAX_MODEL_LEN)), f"PromptTooLong: .*max_model_len {MAX_MODEL_LEN}"),
        (request_of([]), "RequestError: prompt_token_ids is empty"),
        (request_of([1, VOCAB]), rf"RequestError: prompt_token_ids\[1\] is {VOCAB}"),
    ],
)
def test_a_bad_request_is_told_so_and_harms_nobody(
    engine: EngineProcess, request_: GenerateRequest, message: str
) -> None:
    async def work(client: EngineClient) -> list[GenerateChunk]:
        other = asyncio.ensure_future(generate(client, request_of(prompt_of(9))))
        with pytest.raises(RpcError, match=message):
            await generate(client, request_)
        return await other

    (chunk,) = engine.run(work)
    assert len(chunk.token_ids) == 10


def test_closing_a_stream_frees_its_row(engine: EngineProcess) -> None:
    async def work(client: EngineClient) -> None:
        long = request_of(prompt_of(4), max_new_tokens=2000, stream=True)
        await client.pause()  # so that it cannot end by itself
        closed = asyncio.ensure_future(generate(client, long))
        await until(client, running=0, waiting=1)
        closed.cancel()
        await until(client, running=0, waiting=0)
        await client.resume()
        async with aclosing(client.generate(long)) as chunks:
            async for _ in chunks:
                await client.pause()
                await until(client, running=1)
                break
        await until(client, running=0)
        await client.resume()

    engine.run(work)


def test_a_callers_end_frees_its_rows(engine: EngineProcess) -> None:
    async def work(client: EngineClient) -> None:
        other = await EngineClient.connect(engine.socket_path, timeout_s=10)
        await client.pause()
        calls = [asyncio.ensure_future(generate(other, request_of(prompt_of(4)))) for _ in range(3)]
        await until(client, running=0, waiting=3)
        await other.close()
        await until(client, running=0, waiting=0)
        await client.resume()
        assert all(
            isinstance(e, PeerGone | RpcError | asyncio.CancelledError)
            for e in await asyncio.gather(*calls, return_exceptions=True)
        )

    engine.run(work)


def test_update_pause_and_resume_with_requests_in_flight(
    tmp_path: Path, model_dir: Path, new_weights: Path
) -> None:
    with engine_process(tmp_path, model_path=str(model_dir), policy_version=4) as engine:

        async def mid_flight(client: EngineClient) -> None:
            request = request_of(prompt_of(20), max_new_tokens=2000, stream=True)
            stream = client.generate(request)
            versions = [v for _ in range(3) for v in (await anext(stream)).versions.tolist()]
            await client.pause()
            paused = await client.info()
            with pytest.raises(RpcError, match="ModelError: cannot read weights"):
                await client.update_weights(tmp_path / "settings.json", 5, timeout_s=30)
            with pytest.raises(RpcError, match="engine is at 4"):
                await client.update_weights(new_weights, 4, timeout_s=30)
            assert (await client.info()).num_generated_tokens == paused.num_generated_tokens
            await client.update_weights(new_weights, 5, timeout_s=30)
            info = await client.info()
            assert (info.policy_version, info.num_running) == (5, 1)
            assert info.num_generated_tokens == paused.num_generated_tokens
            await client.resume()
            while versions.count(5) < 10:
                versions += (await anext(stream)).versions.tolist()
            await stream.aclose()  # type: ignore[attr-defined]
            assert versions[: versions.index(5)] == [4] * paused.num_generated_tokens
            assert set(versions[versions.index(5) :]) == {5}
            await until(client, running=0)
            (after,) = await generate(client, request_of(prompt_of(30)))
            new = greedy_reference(make_model("llama", seed=1), prompt_of(30), 10)
            assert after.token_ids.tolist() == new
            assert set(after.versions.tolist()) == {5}

        engine.run(mid_flight)
        engine.process.send_signal(signal.SIGTERM)
        assert engine.process.wait(10.0) == 0
        assert not engine.socket_path.exists()


def test_a_model_that_cannot_be_served_ends_it_with_the_reason(tmp_path: Path) -> None:
    settings = {"socket_path": str(tmp_path / "s"), "model_path": str(tmp_path / "none")}
    with pytest.raises(ModelError, match="cannot read a model config"):
        asyncio.run(serve(settings))


def test_memory_for_not_even_one_sequence_is_an_error(tmp_path: Path, model_dir: Path) -> None:
    settings = {"socket_path": str(tmp_path / "s"), "model_path": str(model_dir)}
    with pytest.raises(ModelError, match="one sequence of max_model_len 2048 needs 2 MiB"):
        asyncio.run(serve({**settings, "device": "cpu", "max_kv_bytes": 2**20}))
