"""Our requests as vLLM's HTTP bodies, and its answers as tokens. Pure.

Two ways in, chosen by the probe: `/inference/v1/generate` (tokens in, tokens out, with the engine's
own spans of weight versions) and, where a server has not got it, `/v1/completions` with token ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from areal_sub.engines.embedded.request import Request
from areal_sub.errors import ArealSubError

SERVED_NAME = "policy"
# vLLM's way of writing that a logprob is NaN, or not there.
NO_LOGPROB = -9999.0


class Way(StrEnum):
    GENERATE = "/inference/v1/generate"
    COMPLETIONS = "/v1/completions"


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
    sampling: dict[str, Any] = {
        "max_tokens": request.max_new_tokens - len(token_ids),
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "logprobs": 0,  # of the sampled token alone
        "stop_token_ids": sorted(request.stop_token_ids),
        "ignore_eos": True,  # what ends a turn, the caller says
    }
    common = {"stream": stream, "return_token_ids": True, "cache_salt": salt, "model": model}
    if way is Way.GENERATE:
        return {"token_ids": prompt, "sampling_params": {**sampling, "detokenize": False}, **common}
    return {"prompt": prompt, **sampling, "return_tokens_as_token_ids": True, **common}


def piece_of(way: Way, data: Any) -> Piece | None:
    """The one choice of an answer or event; None where it brings none. Raises `ReplyError`."""
    if isinstance(data, dict) and "error" in data:
        raise ReplyError(f"vLLM failed the request: {data['error']}")
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
    if not all(math.isfinite(value) and value > NO_LOGPROB for value in values):
        raise ReplyError("vLLM sampled from logits that are not finite: are the weights sound?")
    return Piece(prompt, token_ids, values, choice.get("finish_reason"), versions)


def versions_of(spans: Sequence[tuple[str, int, int]], num_tokens: int) -> list[int]:
    """The policy version of each token. Raises `ReplyError` where the spans leave one out."""
    versions = [-1] * num_tokens
    for version, start, end in spans:
        if not version.isdecimal():
            raise ReplyError(f"vLLM names a weight version {version!r} that we did not give it")
        versions[start:end] = [int(version)] * len(versions[start:end])
    if -1 in versions:
        raise ReplyError(f"vLLM's weight versions {list(spans)} do not cover {num_tokens} tokens")
    return versions
