"""What a server can do, found out by asking it, and what is wrong, in words that mend it.

Asked once per server and start. Each problem is a `ConfigError` with the flag or variable to set.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from areal_sub.engines.embedded.request import Request
from areal_sub.engines.vllm.api import Api, Refused, ServerGone
from areal_sub.engines.vllm.wire import Piece, ReplyError, Way, body_of, piece_of
from areal_sub.errors import ConfigError, DeadlineExceeded
from areal_sub.records import GenerateRequest, int32

# vLLM's weight API changed in 0.16, 0.22, 0.26 and 0.29; what is used here is of the last of these.
MIN_VERSION = (0, 29)
TESTED_VERSION = "0.32.0"
# The one whose answers are understood here.
SGLANG_VERSION = "0.5.23"
# By how much its longest prompt (`max_req_input_len`) is shorter than its context.
SGLANG_RESERVED = 6
BACKEND = "areal-sub-file"
BROADCASTS = {"areal-sub-gloo": "gloo", "areal-sub-nccl": "nccl"}
LOGPROBS_MODE = "processed_logprobs"
ANSWER_TIMEOUT_S = 30.0
# The first tokens of a fresh server may compile kernels.
FIRST_TOKEN_TIMEOUT_S = 300.0


class WeightPath(StrEnum):
    """How new weights get into a server."""

    FILE = "file"  # a backend of ours, in `plugin/`
    BROADCAST = "broadcast"  # two others of ours, for servers that do not see the file
    RELOAD = "reload"  # vLLM's own `reload_weights`
    ADAPTER = "adapter"  # vLLM's own loading of LoRA adapters
    DISK = "disk"  # SGLang's `/update_weights_from_disk`


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    version: str
    way: Way
    weight_path: WeightPath
    model: str  # the name that requests give
    max_model_len: int
    num_slots: int
    dtype: str
    num_workers: int  # processes that have weights
    broadcasts: str  # by what: "gloo" or "nccl"; "": not
    no_grammars: str  # why outputs cannot be held to a grammar there; "": they can


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """What a server has to be able to take adapters over.

    Not over the output embedding: where vLLM adapts that, `prompt_logprobs`, which each adapter is
    verified by, end the engine (0.32 on a CPU) as soon as another request runs beside it.
    """

    rank: int
    targets: list[str]  # last parts of layers' names


async def probe(api: Api, *, max_model_len: int, lora: Lora | None = None) -> Abilities:
    """`lora`: what it will be given are adapters.

    Raises `ConfigError`; `ServerGone` and `DeadlineExceeded` from a server that was there.
    """
    if (info := await _sglang_info(api)) is not None:
        api.kind = "SGLang"
        return await _probe_sglang(api, info, max_model_len=max_model_len, lora=lora)
    version = await _version(api)
    await _check_dev_mode(api)
    config = await _server_config(api)
    model = config["model_config"]
    served_len = int(model.get("max_model_len") or 0)
    if served_len < max_model_len:
        raise ConfigError(
            f"{api} serves up to {served_len} tokens, the run needs {max_model_len}: "
            f"restart it with --max-model-len {max_model_len}, or set "
            f"engine.max_model_len={served_len}"
        )
    if (mode := model.get("logprobs_mode")) != LOGPROBS_MODE:
        raise ConfigError(
            f"{api} gives {mode}, which are not of the distribution that is sampled "
            f"from: restart it with --logprobs-mode {LOGPROBS_MODE}"
        )
    name = (await api.get("/v1/models", timeout_s=ANSWER_TIMEOUT_S))["data"][0]["id"]
    backend = str((config.get("weight_transfer_config") or {}).get("backend"))
    broadcasts = BROADCASTS.get(backend, "")
    weight_path = WeightPath.FILE if backend == BACKEND else WeightPath.RELOAD
    if broadcasts:
        weight_path = WeightPath.BROADCAST
    if lora is not None:
        await _check_lora(api, config, lora)
        weight_path = WeightPath.ADAPTER
    way = await _way(api, name)
    return Abilities(
        version=version,
        way=way,
        weight_path=weight_path,
        model=name,
        max_model_len=served_len,
        num_slots=int((config.get("scheduler_config") or {}).get("max_num_seqs") or 1),
        dtype=str(model.get("dtype", "")).removeprefix("torch."),
        num_workers=_num_workers(config),
        broadcasts=broadcasts,
        no_grammars=await _no_grammars(api, way, name, config),
    )


async def _sglang_info(api: Api) -> dict[str, Any] | None:
    """What SGLang says of its model; None where it is none, or nothing answers."""
    try:
        info = await api.get("/model_info", timeout_s=ANSWER_TIMEOUT_S)
    except (Refused, ServerGone, DeadlineExceeded):
        return None
    return info if isinstance(info, dict) and "weight_version" in info else None


async def _probe_sglang(
    api: Api, info: dict[str, Any], *, max_model_len: int, lora: Lora | None
) -> Abilities:
    if lora is not None:
        raise ConfigError(
            f"{api} is not given adapters: train all weights (actor.lora=null), or sample with "
            f"vLLM ({TESTED_VERSION} is tested) or engine.type=embedded"
        )
    if info.get("preferred_sampling_params"):
        raise ConfigError(
            f"{api} samples by parameters of its own: restart it without "
            "--preferred-sampling-params"
        )
    server = await api.get("/server_info", timeout_s=ANSWER_TIMEOUT_S)
    if not isinstance(server, dict):
        raise ConfigError(f"{api} does not say how it is configured (/server_info)")
    served_len = int(server.get("max_req_input_len") or 0)
    if served_len < max_model_len:
        raise ConfigError(
            f"{api} serves up to {served_len} tokens, the run needs {max_model_len}: restart it "
            f"with --context-length {max_model_len + SGLANG_RESERVED} or more, and memory for as "
            f"many (--mem-fraction-static), or set engine.max_model_len={served_len}"
        )
    for stream in (False, True):
        await _sample_sglang(api, stream=stream)
    return Abilities(
        version=str(server.get("version")),
        way=Way.SGLANG,
        weight_path=WeightPath.DISK,
        model=str(info.get("served_model_name") or info.get("model_path")),
        max_model_len=served_len,
        num_slots=int(server.get("max_running_requests") or 1),
        dtype=str(server.get("dtype", "")).removeprefix("torch."),
        num_workers=1,
        broadcasts="",
        no_grammars=f"{api} is SGLang, whose logprobs would be of what the grammar leaves, while "
        "the learner's are of the whole distribution",
    )


async def _sample_sglang(api: Api, *, stream: bool) -> None:
    """At a temperature at which all tokens are about equally likely, if logprobs are of the
    distribution that is sampled from."""
    body = body_of(Way.SGLANG, _HOT_TOKENS, [], salt="probe", stream=stream, model="")
    path = Way.SGLANG.value
    try:
        pieces: list[Piece] = []
        if stream:
            async with asyncio.timeout(FIRST_TOKEN_TIMEOUT_S):
                async for data in api.stream(path, body):
                    num_taken = sum(len(piece.token_ids) for piece in pieces)
                    pieces.append(_piece(Way.SGLANG, data, num_taken))
        else:
            data = await api.post(path, body, timeout_s=FIRST_TOKEN_TIMEOUT_S)
            pieces.append(_piece(Way.SGLANG, data, 0))
    except TimeoutError:
        raise DeadlineExceeded(
            f"{api} did not sample {_HOT_TOKENS.max_new_tokens} tokens within "
            f"{FIRST_TOKEN_TIMEOUT_S:.0f} s"
        ) from None
    except Refused as error:
        raise ConfigError(f"{api} cannot sample from this model: {error.said}") from None
    except ReplyError as error:
        raise ConfigError(f"{api} answers {path}, but: {error}") from None
    logprobs = [value for piece in pieces for value in piece.logprobs]
    if not logprobs or pieces[0].prompt_token_ids != _HOT_TOKENS.prompt.tolist():
        raise ConfigError(
            f"{api} does not return the token ids that it read and sampled, without which there is "
            f"nothing exact to train on: use a version near {SGLANG_VERSION}"
        )
    if pieces[-1].versions is None:
        raise ConfigError(
            f"{api} does not say which weights each token was sampled with (weight_versions): use "
            f"a version near {SGLANG_VERSION}"
        )
    if max(logprobs) - min(logprobs) > 0.5:
        raise ConfigError(
            f"{api} gives logprobs that are not of the distribution that is sampled from: restart "
            "it without SGLANG_RETURN_ORIGINAL_LOGPROB in its environment"
        )


def _piece(way: Way, data: Any, num_taken: int) -> Piece:
    piece = piece_of(way, data, num_taken)
    if piece is None:
        raise ReplyError("an answer of it brings nothing")
    return piece


async def _version(api: Api) -> str:
    try:
        answer = await api.get("/version", timeout_s=ANSWER_TIMEOUT_S)
    except (ServerGone, DeadlineExceeded) as error:
        raise ConfigError(
            f"no vLLM server answers at {api.name} ({error}): is it running, and are host and port "
            "the ones that it was started with (--host, --port)?"
        ) from None
    except Refused as error:
        answer = error
    if not isinstance(answer, dict) or not isinstance(answer.get("version"), str):
        if await _is_other_engine(api):
            raise ConfigError(
                f"what listens at {api.name} serves models, but is neither vLLM nor an SGLang that "
                "is new enough: areal-sub knows no way to put new weights into it under running "
                "requests and to learn which of them a token was sampled with, so it does not "
                f"train with it: serve the model with vLLM ({TESTED_VERSION} is tested) or SGLang "
                f"(near {SGLANG_VERSION})"
            )
        raise ConfigError(
            f"what listens at {api.name} is no vLLM server (it has no /version): is the port right?"
        )
    version: str = answer["version"]
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None:  # a build from source
        return version
    if (int(numbers[1]), int(numbers[2])) < MIN_VERSION:
        least = ".".join(map(str, MIN_VERSION))
        raise ConfigError(
            f"{api} is version {version}; its way of taking new weights is the one of "
            f"{least} and later: pip install 'vllm>={least}' ({TESTED_VERSION} is tested) in its "
            "environment, and restart it"
        )
    return version


async def _is_other_engine(api: Api) -> bool:
    try:
        answer = await api.get("/v1/models", timeout_s=ANSWER_TIMEOUT_S)
    except (Refused, ServerGone, DeadlineExceeded):
        return False
    return isinstance(answer, dict) and isinstance(answer.get("data"), list)


async def _check_dev_mode(api: Api) -> None:
    try:
        await api.get("/is_paused", timeout_s=ANSWER_TIMEOUT_S)
    except Refused as error:
        if error.status != 404:
            raise _odd(error) from None
        raise ConfigError(
            f"{api} has no /pause, so its weights cannot be changed: restart it with "
            "VLLM_SERVER_DEV_MODE=1 in its environment"
        ) from None


async def _check_lora(api: Api, config: dict[str, Any], lora: Lora) -> None:
    served = config.get("lora_config")
    if not isinstance(served, dict) or int(served.get("max_lora_rank") or 0) < lora.rank:
        raise ConfigError(
            f"{api} takes no adapters of rank {lora.rank} (actor.lora): restart it "
            f"with --enable-lora --max-loras 4 --max-lora-rank {lora.rank} (or the next rank that "
            f"vLLM has) --lora-target-modules {' '.join(lora.targets)}"
        )
    targets = served.get("target_modules")
    if targets is None or any(target.endswith("lm_head") for target in targets):
        raise ConfigError(
            f"{api} adapts the output embedding, too, and may end when an adapter is "
            "verified under running requests: restart it with --lora-target-modules "
            + " ".join(lora.targets)
        )
    try:
        # Without a name it is refused, but not as a path that there is not.
        nothing = {"lora_name": "", "lora_path": ""}
        await api.post("/v1/load_lora_adapter", nothing, timeout_s=ANSWER_TIMEOUT_S)
    except Refused as error:
        if error.status == 404:
            raise ConfigError(
                f"{api} loads no adapters while it runs: restart it with "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"
            ) from None


async def _server_config(api: Api) -> dict[str, Any]:
    try:
        info = await api.get("/server_info?config_format=json", timeout_s=ANSWER_TIMEOUT_S)
        config: dict[str, Any] = info["vllm_config"]
        if not isinstance(config["model_config"], dict):
            raise KeyError("model_config")
    except Refused as error:
        raise _odd(error) from None
    except (KeyError, TypeError):
        raise ConfigError(
            f"{api} does not say how it is configured (/server_info): use a version "
            f"near {TESTED_VERSION}"
        ) from None
    return config


def _num_workers(config: dict[str, Any]) -> int:
    parallel = config.get("parallel_config") or {}
    return int(parallel.get("world_size") or 1) * int(parallel.get("data_parallel_size") or 1)


async def _way(api: Api, model: str) -> Way:
    """Sample one token: what can be asked is not always what can be computed."""
    for way in (Way.GENERATE, Way.COMPLETIONS):
        body = body_of(way, _ONE_TOKEN, [], salt="probe", stream=False, model=model)
        try:
            answer = await api.post(way.value, body, timeout_s=FIRST_TOKEN_TIMEOUT_S)
        except Refused as error:
            if error.status == 404 and way is Way.GENERATE:
                continue
            if error.status == 403:
                raise ConfigError(
                    f"{api} refuses {way.value}: restart it with --enable-scale-out"
                ) from None
            raise ConfigError(
                f"{api} cannot sample from this model (its log says why): {error.said}"
            ) from None
        try:
            piece = piece_of(way, answer)
        except ReplyError as error:
            raise ConfigError(f"{api} answers {way.value}, but: {error}") from None
        if piece is None or not piece.token_ids or piece.prompt_token_ids is None:
            break
        return way
    raise ConfigError(
        f"{api} does not return token ids, without which there is nothing exact to "
        f"train on: use a version near {TESTED_VERSION}"
    )


async def _no_grammars(api: Api, way: Way, model: str, config: dict[str, Any]) -> str:
    """Why outputs cannot be held to a grammar; found out by holding one to tokens that a model
    would hardly choose by itself."""
    if config.get("speculative_config"):
        return f"{api} decodes speculatively: restart it without --speculative-config"
    body = body_of(way, _FORCED, [], salt="probe", stream=False, model=model)
    mend = (
        "restart it with areal-sub's plugin on its PYTHONPATH, --structured-outputs-config "
        """'{"backend": "guidance"}', VLLM_USE_V2_MODEL_RUNNER=0 and a tokenizer"""
    )
    try:
        piece = _piece(way, await api.post(way.value, body, timeout_s=FIRST_TOKEN_TIMEOUT_S), 0)
    except Refused as error:
        return f"{api} says: {error.said}; {mend}"
    except ReplyError as error:
        return f"{api}: {error}; {mend}"
    if piece.token_ids != FORCED_TOKEN_IDS:
        return f"{api} does not hold outputs to a grammar; {mend}"
    if sum(piece.logprobs) > -0.1:
        return f"{api} gives logprobs of what the grammar leaves; {mend}"
    return ""


# The first few of a vocabulary may have a meaning.
FORCED_TOKEN_IDS = [11, 10, 11, 10]

_FORCED = Request.checked(
    GenerateRequest(
        prompt_token_ids=int32([1, 2]),
        max_new_tokens=len(FORCED_TOKEN_IDS),
        temperature=1.0,
        stop_token_ids=[2],
        grammar="start: " + " ".join(f"<[{token_id}]>" for token_id in FORCED_TOKEN_IDS),
    ),
    request_id=0,
    vocab_size=12,
    max_model_len=2 + len(FORCED_TOKEN_IDS),
)

_ONE_TOKEN = Request.checked(
    GenerateRequest(prompt_token_ids=int32([1]), max_new_tokens=1, temperature=0.0),
    request_id=0,
    vocab_size=2,
    max_model_len=2,
)


_HOT_TOKENS = Request.checked(
    GenerateRequest(prompt_token_ids=int32([1, 2]), max_new_tokens=8, temperature=1000.0),
    request_id=0,
    vocab_size=3,
    max_model_len=10,
)


def _odd(error: Refused) -> ConfigError:
    return ConfigError(f"{error}: use a version near {TESTED_VERSION}")
