"""Our requests as HTTP bodies of vLLM or SGLang, and their answers as tokens. Pure.

Ways in, chosen by the probe: vLLM's `/inference/v1/generate` (tokens in, tokens out, with the
engine's own spans of weight versions) and, where a server has not got it, `/v1/completions` with
token ids; SGLang's `/generate`, which has all that the first has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from areal_sub.engines.embedded.grammars import order_of
from areal_sub.engines.embedded.request import Request
from areal_sub.errors import ArealSubError

SERVED_NAME = "policy"
# vLLM's way of writing that a logprob is NaN, or not there.
NO_LOGPROB = -9999.0
# That a request's masks may take beyond a bit for each: all requests of the batch wait for them.
GRAMMAR_CPU_S = 1.0


class Way(StrEnum):
    GENERATE = "/inference/v1/generate"
    COMPLETIONS = "/v1/completions"
    SGLANG = "/generate"


class ReplyError(ArealSubError):
    """An answer that is not what was asked for: this request fails, the others go on."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one answer, or one event of a stream, brings."""

    prompt_token_ids: list[int] | None  # as the engine read them; on the first piece
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str | None
    versions: list[tuple[str, int, int]] | None
    """(version, start, end) over all output tokens; on the last piece, where the engine says so."""


def body_of(
    way: Way, request: Request, token_ids: Sequence[int], *, salt: str, stream: bool, model: str
) -> dict[str, Any]:
    """Go on with `request`, of which `token_ids` have been sampled already.

    `salt`: prompts share cached keys and values only with others of the same one.
    """
    prompt = [*request.prompt.tolist(), *token_ids]
    if way is Way.SGLANG:
        return _sglang_body(request, prompt, len(token_ids), salt=salt, stream=stream)
    sampling: dict[str, Any] = {
        "max_tokens": request.max_new_tokens - len(token_ids),
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "logprobs": 0,  # of the sampled token alone
        "stop_token_ids": sorted(request.stop_token_ids),
        "ignore_eos": True,  # what ends a turn, the caller says
    }
    if request.grammar:  # for `plugin/areal_sub_vllm/grammars.py`
        order = order_of(
            request.grammar,
            stop_token_ids=request.stop_token_ids,
            cpu_s=GRAMMAR_CPU_S,
            taken=token_ids,
        )
        sampling["structured_outputs"] = {"grammar": order}
    common = {"stream": stream, "return_token_ids": True, "cache_salt": salt, "model": model}
    if way is Way.GENERATE:
        return {"token_ids": prompt, "sampling_params": {**sampling, "detokenize": False}, **common}
    return {"prompt": prompt, **sampling, "return_tokens_as_token_ids": True, **common}


def _sglang_body(
    request: Request, prompt: list[int], num_sampled: int, *, salt: str, stream: bool
) -> dict[str, Any]:
    sampling = {
        "max_new_tokens": request.max_new_tokens - num_sampled,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k or -1,
        # With `ignore_eos` these would not count either; so the model's own end a turn, too.
        "stop_token_ids": sorted(request.stop_token_ids),
    }
    return {
        "input_ids": prompt,
        "sampling_params": sampling,
        "return_logprob": True,
        "return_prompt_token_ids": True,
        "cache_salt": salt,
        "stream": stream,
    }


def piece_of(way: Way, data: Any, num_taken: int = 0) -> Piece | None:
    """The one choice of an answer or event; None where it brings none. Raises `ReplyError`.

    `num_taken`: tokens that earlier events of the answer brought.
    """
    if isinstance(data, dict) and "error" in data:
        raise ReplyError(f"the server failed the request: {data['error']}")
    if way is Way.SGLANG:
        return _sglang_piece(data, num_taken)
    try:
        if not data["choices"]:
            return None
        choice = data["choices"][0]
        token_ids = choice.get("token_ids") or []
        logprobs = choice.get("logprobs") or {}
        if way is Way.GENERATE:
            prompt = data.get("prompt_token_ids")
            values = [float(entry["logprob"]) for entry in logprobs.get("content") or []]
        else:
            prompt = choice.get("prompt_token_ids")
            values = [float(value) for value in logprobs.get("token_logprobs") or []]
        spans = choice.get("weight_versions")
        versions = [(s["version"], s["start"], s["end"]) for s in spans] if spans else None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ReplyError(f"an answer of vLLM's is not understood ({error!r})") from None
    if len(values) != len(token_ids):
        raise ReplyError(f"vLLM sent {len(token_ids)} tokens with {len(values)} logprobs")
    _check_finite(values)
    return Piece(prompt, token_ids, values, choice.get("finish_reason"), versions)


def _sglang_piece(data: Any, num_taken: int) -> Piece:
    """An event holds all tokens so far, or with `--incremental-streaming-output` the new ones."""
    try:
        meta = data["meta_info"]
        num_new = int(meta["completion_tokens"]) - num_taken
        entries = meta.get("output_token_logprobs") or []
        if len(entries) not in (num_new, num_new + num_taken):
            raise ReplyError(
                f"SGLang sent {num_new} new tokens after {num_taken}, with {len(entries)} logprobs"
            )
        new = entries[len(entries) - num_new :]
        token_ids = [int(entry[1]) for entry in new]
        values = [float(entry[0]) for entry in new]
        finish_reason = (meta.get("finish_reason") or {}).get("type")
        prompt = data.get("prompt_token_ids") if num_taken == 0 else None
        spans = meta.get("weight_versions")
        versions = [(s["version"], s["start"], s["end"]) for s in spans] if spans else None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ReplyError(f"an answer of SGLang's is not understood ({error!r})") from None
    _check_finite(values)
    return Piece(prompt, token_ids, values, finish_reason, versions)


def _check_finite(logprobs: Sequence[float]) -> None:
    if not all(math.isfinite(value) and value > NO_LOGPROB for value in logprobs):
        raise ReplyError("sampled from logits that are not finite: are the weights sound?")


def score_body_of(way: Way, token_ids: list[int], *, salt: str, model: str) -> dict[str, Any]:
    """For the logprobs of `token_ids` themselves, at temperature 1."""
    if way is Way.SGLANG:
        sampling: dict[str, Any] = {"max_new_tokens": 1, "temperature": 1.0}
        return {
            "input_ids": token_ids,
            "sampling_params": sampling,
            "return_logprob": True,
            "logprob_start_len": 0,
            "cache_salt": salt,
        }
    sampling = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
    common = {"model": model, "cache_salt": salt}
    if way is Way.GENERATE:
        return {"token_ids": token_ids, "sampling_params": sampling, **common}
    return {"prompt": token_ids, **sampling, **common}


def scores_of(way: Way, token_ids: list[int], data: Any) -> list[float]:
    """Logprobs of all `token_ids` but the first. Raises `ReplyError`."""
    try:
        if way is Way.SGLANG:
            entries = data["meta_info"]["input_token_logprobs"]
            if [entry[1] for entry in entries] != token_ids:
                raise ReplyError("it scored other tokens than it was asked to")
            return [float(entry[0]) for entry in entries[1:]]
        entries = data.get("prompt_logprobs") or data["choices"][0].get("prompt_logprobs")
        pairs = zip(entries[1:], token_ids[1:], strict=True)
        return [float(entry[str(token_id)]["logprob"]) for entry, token_id in pairs]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ReplyError(f"the logprobs of a prompt are not understood ({error!r})") from None


def versions_of(spans: Sequence[tuple[str, int, int]], num_tokens: int) -> list[int]:
    """The policy version of each token. Raises `ReplyError` where the spans leave one out."""
    versions = [-1] * num_tokens
    for version, start, end in spans:
        if not version.isdecimal():
            raise ReplyError(f"it names a weight version {version!r} that we did not give it")
        versions[start:end] = [int(version)] * len(versions[start:end])
    if -1 in versions:
        raise ReplyError(f"its weight versions {list(spans)} do not cover {num_tokens} tokens")
    return versions
