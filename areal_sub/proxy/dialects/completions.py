"""OpenAI's legacy Completions: `POST /v1/completions`. Text or token ids in, text out, no template.

What the policy says is given as it is: neither tool calls nor reasoning are looked for in it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import orjson

from areal_sub.proxy.dialects import EVENTS, Asked, fields, openai_errors
from areal_sub.proxy.dialects.openai_errors import error_body as error_body
from areal_sub.proxy.dialects.openai_errors import error_status as error_status
from areal_sub.proxy.neutral import Call, Choice, Delta, FinishReason, TokenLogprob, Usage
from areal_sub.proxy.refusals import Refusal, invalid

NAME = "completions"
ID_PREFIX = "cmpl-"
REQUEST_ID = "x-request-id"

DEFAULT_MAX_TOKENS = 16  # OpenAI's
_REFUSED = {
    "echo": "the prompt is not repeated; leave echo out.",
    "suffix": "nothing can be inserted; leave suffix out.",
    "logprobs": "only those of the sampled tokens are known; use 0.",
}


def parse(asked: Asked) -> Call:
    body = fields.load(asked.raw)
    for key, why in _REFUSED.items():
        if body.get(key):
            raise invalid(f"{key}: {why}", key)
    if body.get("best_of") not in (None, 1, body.get("n")):
        raise invalid("best_of: all samples are returned; leave best_of out.", "best_of")
    stream_options = fields.mapping(body, "stream_options")
    max_new_tokens = fields.integer(body, "max_tokens", at_least=1, at_most=fields.MAX_TOKENS)
    return Call(
        dialect=NAME,
        model=fields.text(body, "model", max_chars=fields.MAX_NAME_CHARS, default="policy"),
        messages=(),
        raw_prompt=_prompt(body.get("prompt")),
        num_choices=fields.integer(body, "n", at_least=1, at_most=fields.MAX_CHOICES) or 1,
        max_new_tokens=max_new_tokens or DEFAULT_MAX_TOKENS,
        temperature=fields.number(body, "temperature", at_least=0, at_most=2),
        top_p=fields.number(body, "top_p", at_least=0, at_most=1),
        top_k=fields.integer(body, "top_k", at_least=0, at_most=fields.MAX_TOKENS),
        stop=fields.stops(body, "stop"),
        stream=fields.boolean(body, "stream"),
        include_usage=fields.boolean(stream_options, "include_usage", where="stream_options."),
        logprobs=body.get("logprobs") is not None and body["logprobs"] is not False,
        num_bytes=len(asked.raw),
    )


def _prompt(value: Any) -> str | tuple[int, ...]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return tuple(value)
    raise invalid("prompt: one text, or one list of token ids, and not an empty one.", "prompt")


# Answers


def answer(answer_id: str, call: Call, choices: Sequence[Choice], usage: Usage) -> bytes:
    return orjson.dumps(
        {
            **_head(answer_id, call),
            "choices": [
                _choice(call, index, choice.text, choice.finish_reason, choice.logprobs, 0)
                for index, choice in enumerate(choices)
            ],
            "usage": _usage(usage),
        }
    )


def stream(answer_id: str, call: Call, num_prompt_tokens: int) -> Stream:
    return Stream(answer_id, call)


class Stream:
    media_type = EVENTS

    def __init__(self, answer_id: str, call: Call) -> None:
        self._call = call
        self._head = _head(answer_id, call)
        self._num_chars = [0] * call.num_choices

    def events(self, index: int, delta: Delta) -> Iterator[bytes]:
        text, at = delta.text, self._num_chars[index]
        if text or delta.logprobs or delta.finish_reason is not None:
            choice = _choice(self._call, index, text, delta.finish_reason, delta.logprobs, at)
            self._num_chars[index] += len(text)
            yield _event({**self._head, "choices": [choice]})

    def end(self, usage: Usage) -> bytes:
        last = b""
        if self._call.include_usage:
            last = _event({**self._head, "choices": [], "usage": _usage(usage)})
        return last + b"data: [DONE]\n\n"

    def failure(self, refusal: Refusal) -> bytes:
        return _event({"error": openai_errors.error(refusal)})


def _head(answer_id: str, call: Call) -> dict[str, Any]:
    return {
        "id": answer_id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": call.model,
    }


def _choice(
    call: Call,
    index: int,
    text: str,
    finish_reason: FinishReason | None,
    logprobs: Sequence[TokenLogprob],
    offset: int,
) -> dict[str, Any]:
    return {
        "index": index,
        "text": text,
        "logprobs": _logprobs(logprobs, offset) if call.logprobs else None,
        "finish_reason": finish_reason,
    }


def _logprobs(logprobs: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    offsets = []
    for each in logprobs:
        offsets.append(offset)
        offset += len(each.token)
    return {
        "tokens": [each.token for each in logprobs],
        "token_logprobs": [each.logprob for each in logprobs],
        "top_logprobs": None,
        "text_offset": offsets,
    }


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_sampled_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_sampled_tokens,
    }


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"
