"""SGLang through our engine process: its native API, spoken by a real HTTP server over a tiny model
(`sglang_server`), not by SGLang itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_lab import (
    EngineProcess,
    engine_process,
    generate,
    greedy_reference,
    joined,
    prompt_of,
    request_of,
)
from engine_lab import make_model as make
from safetensors.torch import save_file
from sglang_server import SglangServer, serving

from areal_sub.engine_client import EngineClient
from areal_sub.engines.vllm.api import Api
from areal_sub.engines.vllm.probe import Abilities, Lora, WeightPath, probe
from areal_sub.engines.vllm.wire import Way
from areal_sub.errors import ConfigError, RpcError
from areal_sub.records import WEIGHT_PROBE, extend_digest, int32

DEADLINE_S = 60.0


@pytest.fixture(params=[False, True], ids=["cumulative", "incremental"])
def server(request: pytest.FixtureRequest) -> Iterator[SglangServer]:
    with serving(SglangServer(make("llama", seed=5), incremental=request.param)) as server:
        yield server


@pytest.fixture
def engine(server: SglangServer, model_dir: Path, tmp_path: Path) -> Iterator[EngineProcess]:
    """The server has other weights than the run begins with: it is given those."""
    with engine_process(
        tmp_path,
        "vllm",
        model_path=str(model_dir),
        urls=[server.url],
        max_model_len=512,
    ) as engine:
        yield engine


def logprobs_of(model: Any, prompt: Sequence[int], token_ids: Sequence[int]) -> list[float]:
    scores = model(torch.tensor([[*prompt, *token_ids]])).logits[0].log_softmax(-1)
    return [float(scores[len(prompt) - 1 + i, t]) for i, t in enumerate(token_ids)]


def write_weights(model: Any, path: Path, *, off: float = 0.0) -> Path:
    ids = prompt_of(17)
    said = [value + off for value in logprobs_of(model, ids[:1], ids[1:])]
    state = model.state_dict()
    state.pop("lm_head.weight")
    save_file(state, path, {WEIGHT_PROBE: json.dumps({"token_ids": ids, "logprobs": said})})
    return path


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_logprobs_and_digests_are_the_models(
    server: SglangServer, engine: EngineProcess, stream: bool
) -> None:
    model, prompt = make("llama"), prompt_of(9)
    want = greedy_reference(model, prompt, 20)

    async def work(client: EngineClient) -> Any:
        stop = want[7]
        return (
            await generate(client, request_of(prompt, max_new_tokens=20, stream=stream)),
            await generate(client, request_of(prompt, stream=stream, stop_token_ids=[stop])),
            await generate(client, request_of(prompt, stream=stream, temperature=1.0)),
        )

    whole, stopped, drawn = engine.run(work, DEADLINE_S)
    assert len(whole) == (20 if stream else 1)
    assert joined(whole, "token_ids") == want and whole[-1].finish_reason == "length"
    digests = [extend_digest(0, int32([*prompt, *want[: i + 1]])) for i in range(20)]
    assert joined(whole, "digests") == digests
    assert joined(stopped, "token_ids") == want[: want.index(want[7]) + 1]
    assert stopped[-1].finish_reason == "stop"
    for chunks in (whole, drawn):
        assert set(joined(chunks, "versions")) == {0}
        expected = logprobs_of(model, prompt, joined(chunks, "token_ids"))
        assert joined(chunks, "logprobs") == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_in_flight_over_an_update_has_both_versions(
    server: SglangServer, engine: EngineProcess, tmp_path: Path, stream: bool
) -> None:
    prompt = prompt_of(9)
    old, new = make("llama"), make("llama", seed=1)

    async def work(client: EngineClient) -> Any:
        await client.info()
        server.hold_at = 12
        request = request_of(prompt, max_new_tokens=30, stream=stream, temperature=1.0)
        call = asyncio.ensure_future(generate(client, request))
        witness = request_of(prompt_of(5), max_new_tokens=30, stream=True)
        async with aclosing(client.generate(witness)) as chunks:
            for _ in range(12):  # then it waits, as the other does
                await anext(chunks)
            path = write_weights(new, tmp_path / "v1.safetensors")
            await client.update_weights(path, 1, timeout_s=DEADLINE_S)
        return await call, (await client.info()).policy_version

    chunks, version = engine.run(work, DEADLINE_S)
    versions, token_ids = joined(chunks, "versions"), joined(chunks, "token_ids")
    assert version == 1 and len(versions) == 30 and versions == sorted(versions)
    switch = versions.index(1)
    assert 0 < switch <= 12
    for model, part in ((old, slice(None, switch)), (new, slice(switch, None))):
        expected = logprobs_of(model, prompt, token_ids)[part]
        assert joined(chunks, "logprobs")[part] == pytest.approx(expected, abs=1e-4)
    assert set(server.paused_modes) == {"in_place"}
    assert {"v0", "verify-1"} < set(server.salts)


def test_weights_that_do_not_compute_the_same_are_found_out(
    engine: EngineProcess, tmp_path: Path
) -> None:
    async def work(client: EngineClient) -> None:
        path = write_weights(make("llama", seed=1), tmp_path / "v1.safetensors", off=0.1)
        with pytest.raises(RpcError, match=r"SGLang at .* does not compute what the learner"):
            await client.update_weights(path, 1, timeout_s=DEADLINE_S)

    engine.run(work, DEADLINE_S)


def probed(server: SglangServer, lora: Lora | None = None) -> Abilities:
    async def main() -> Abilities:
        api = Api.at_url(server.url)
        try:
            return await probe(api, max_model_len=512, lora=lora)
        finally:
            await api.close()

    with serving(server):
        return asyncio.run(main())


def test_what_it_can_do_is_found_out() -> None:
    abilities = probed(SglangServer(make("llama")))
    assert "whose logprobs would be of what the grammar leaves" in abilities.no_grammars
    assert replace(abilities, no_grammars="") == Abilities(
        version="0.5.23",
        way=Way.SGLANG,
        weight_path=WeightPath.DISK,
        model="tiny",
        max_model_len=1024,
        num_slots=16,
        dtype="float32",
        num_workers=1,
        broadcasts="",
        no_grammars="",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"original_logprobs": True}, "restart it without SGLANG_RETURN_ORIGINAL_LOGPROB"),
        ({"leave_out": ("prompt_token_ids",)}, r"does not return the token ids .*0\.5\.23"),
        ({"leave_out": ("weight_versions",)}, r"which weights each token .*0\.5\.23"),
        ({"leave_out": ("output_token_logprobs",)}, "8 new tokens after 0, with 0 logprobs"),
        ({"server_info": {"max_req_input_len": 506}}, "--context-length 518 or more"),
        ({"info": {"preferred_sampling_params": {"top_k": 5}}}, "--preferred-sampling-params"),
    ],
)
def test_what_is_wrong_is_told_with_what_mends_it(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        probed(SglangServer(make("llama"), **options))


def test_it_is_given_no_adapters() -> None:
    with pytest.raises(ConfigError, match=r"SGLang at .* is not given adapters: .*actor\.lora"):
        probed(SglangServer(make("llama")), Lora(rank=8, targets=["q_proj"]))
