"""Each problem of a vLLM server is told with what mends it; the server is a tiny HTTP stub."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web

from areal_sub.engines.vllm.api import Api
from areal_sub.engines.vllm.probe import FORCED_TOKEN_IDS, Abilities, Lora, WeightPath, probe
from areal_sub.engines.vllm.wire import Way
from areal_sub.errors import ConfigError

Answers = dict[str, tuple[int, Any]]


def good_answers() -> Answers:
    model = {
        "max_model_len": 512,
        "logprobs_mode": "processed_logprobs",
        "dtype": "torch.float32",
    }
    config = {
        "model_config": model,
        "scheduler_config": {"max_num_seqs": 8},
        "weight_transfer_config": {"backend": "areal-sub-file"},
    }
    choice = {"token_ids": [5], "logprobs": {"content": [{"logprob": -1.5}]}}
    completion = {"token_ids": [5], "prompt_token_ids": [1], "logprobs": {"token_logprobs": [-1.5]}}
    return {
        "/version": (200, {"version": "0.32.0"}),
        "/is_paused": (200, {"is_paused": False}),
        "/server_info": (200, {"vllm_config": config}),
        "/v1/models": (200, {"data": [{"id": "m"}]}),
        "/inference/v1/generate": (200, {"prompt_token_ids": [1], "choices": [choice]}),
        "/v1/completions": (200, {"choices": [completion]}),
    }


def probe_stub(answers: Answers, lora: Lora | None = None) -> Abilities:
    async def answer(request: web.Request) -> web.Response:
        status, data = answers.get(request.path, (404, {"detail": "Not Found"}))
        return web.json_response(data, status=status)

    async def main() -> Abilities:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0]
        api = Api.at_url(f"http://{host}:{port}")
        try:
            return await probe(api, max_model_len=512, lora=lora)
        finally:
            await api.close()
            await runner.cleanup()

    return asyncio.run(main())


def _forced(answers: Answers, logprob: float) -> Answers:
    """As a server answers that holds outputs to a grammar."""
    entries = [{"logprob": logprob} for _ in FORCED_TOKEN_IDS]
    choice = {"token_ids": FORCED_TOKEN_IDS, "logprobs": {"content": entries}}
    body = {"prompt_token_ids": [1, 2], "choices": [choice]}
    return answers | {"/inference/v1/generate": (200, body)}


def test_a_good_server_is_known_for_what_it_can_do() -> None:
    assert probe_stub(_forced(good_answers(), -4.0)) == Abilities(
        version="0.32.0",
        way=Way.GENERATE,
        weight_path=WeightPath.FILE,
        model="m",
        max_model_len=512,
        num_slots=8,
        dtype="float32",
        num_workers=1,
        broadcasts="",
        no_grammars="",
    )


def test_why_a_server_holds_no_output_to_a_grammar() -> None:
    assert "does not hold outputs" in probe_stub(good_answers()).no_grammars
    masked = probe_stub(_forced(good_answers(), 0.0)).no_grammars
    assert "logprobs of what the grammar leaves; restart it with areal-sub's plugin" in masked
    speculative = _forced(good_answers(), -4.0)
    speculative["/server_info"][1]["vllm_config"]["speculative_config"] = {"method": "ngram"}
    assert "without --speculative-config" in probe_stub(speculative).no_grammars


def test_what_is_not_there_has_a_substitute() -> None:
    answers = good_answers()
    del answers["/inference/v1/generate"]
    answers["/server_info"][1]["vllm_config"]["weight_transfer_config"] = None
    abilities = probe_stub(answers)
    assert (abilities.way, abilities.weight_path) == (Way.COMPLETIONS, WeightPath.RELOAD)


LORA = Lora(rank=8, targets=["k_proj", "q_proj"])


def _adapters(answers: Answers, **changes: Any) -> Answers:
    served = {"max_lora_rank": 8, "target_modules": ["q_proj", "k_proj"], **changes}
    answers["/server_info"][1]["vllm_config"]["lora_config"] = served
    answers["/v1/load_lora_adapter"] = (400, {"error": {"message": "Both must be provided"}})
    return answers


def test_a_server_that_takes_adapters() -> None:
    abilities = probe_stub(_adapters(good_answers()), LORA)
    assert abilities.weight_path is WeightPath.ADAPTER
    # What it can take it is not given where all weights are trained.
    assert probe_stub(_adapters(good_answers())).weight_path is WeightPath.FILE


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (good_answers(), r"--enable-lora .*--max-lora-rank 8 .*--lora-target-modules k_proj q_pro"),
        (_adapters(good_answers(), max_lora_rank=1), "takes no adapters of rank 8"),
        (_adapters(good_answers(), target_modules=None), "adapts the output embedding, too"),
        (_adapters(good_answers(), target_modules=["lm_head"]), "--lora-target-modules k_proj"),
        (
            _adapters(good_answers()) | {"/v1/load_lora_adapter": (404, {"detail": "Not Found"})},
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
        ),
    ],
)
def test_why_a_server_takes_no_adapters(answers: Answers, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        probe_stub(answers, LORA)


def _model(**fields: Any) -> Callable[[Answers], None]:
    def change(answers: Answers) -> None:
        answers["/server_info"][1]["vllm_config"]["model_config"].update(fields)

    return change


def _answer(path: str, status: int, data: Any) -> Callable[[Answers], None]:
    def change(answers: Answers) -> None:
        answers[path] = (status, data)

    return change


NO_IDS = {"choices": [{"token_ids": [5], "logprobs": {"content": [{"logprob": -1.0}]}}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_answer("/version", 200, {"version": "0.21.3"}), r"pip install 'vllm>=0\.29'"),
        (_answer("/version", 404, {}), "serves models, but is neither .* does not train with it"),
        (_answer("/is_paused", 404, {}), "VLLM_SERVER_DEV_MODE=1"),
        (_answer("/inference/v1/generate", 403, {}), "--enable-scale-out"),
        (
            _answer("/inference/v1/generate", 500, {"error": {"message": "head_dim=16"}}),
            "cannot sample from this model .*: head_dim=16",
        ),
        (_answer("/inference/v1/generate", 200, NO_IDS), "does not return token ids"),
        (_model(logprobs_mode="raw_logprobs"), "--logprobs-mode processed_logprobs"),
        (_model(max_model_len=256), "--max-model-len 512, or set engine.max_model_len=256"),
    ],
)
def test_each_problem_is_told_with_what_mends_it(
    change: Callable[[Answers], None], message: str
) -> None:
    answers = good_answers()
    change(answers)
    with pytest.raises(ConfigError, match=message):
        probe_stub(answers)


def test_what_is_no_engine_at_all() -> None:
    with pytest.raises(ConfigError, match=r"is no vLLM server .* is the port right"):
        probe_stub({"/": (200, "hello")})


def test_a_port_where_nobody_listens() -> None:
    with socket.socket() as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"

        async def main() -> None:
            api = Api.at_url(url)
            try:
                await probe(api, max_model_len=512)
            finally:
                await api.close()

        with pytest.raises(ConfigError, match=f"no vLLM server answers at {url}.*--port"):
            asyncio.run(main())
