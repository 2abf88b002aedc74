"""Google's Gemini: `POST /v1beta/models/{model}:generateContent`, `:streamGenerateContent` (events
with `?alt=sse`, else one JSON array) and `:countTokens`, under `/v1` too.

Field names in camelCase and snake_case. Safety settings, labels, the seed and how much may be
thought change nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import orjson

from areal_sub.proxy.dialects import EVENTS, JSON, Asked, fields, gemini_input
from areal_sub.proxy.dialects.gemini_input import camel, json_schema
from areal_sub.proxy.neutral import (
    Call,
    Choice,
    Delta,
    OutputFormat,
    Part,
    Thought,
    TokenLogprob,
    ToolChoice,
    Usage,
)
from areal_sub.proxy.refusals import ContextTooLong, Reason, Refusal, invalid

NAME = "gemini"
ID_PREFIX = "gen_"
REQUEST_ID = "x-request-id"

STREAM_METHOD = "streamGenerateContent"
METHODS = ("generateContent", STREAM_METHOD)
COUNT_METHOD = "countTokens"


def parse(asked: Asked) -> Call:
    """`asked.path["target"]`: `{model}:{method}`."""
    model, _, method = asked.path["target"].rpartition(":")
    body = camel(fields.load(asked.raw), "body")
    if method == COUNT_METHOD and "generateContentRequest" in body:
        body = camel(body["generateContentRequest"], "generateContentRequest")
    if body.get("cachedContent"):
        raise invalid("nothing is cached here; send the contents.", "cachedContent")
    config = camel(body.get("generationConfig") or {}, "generationConfig")
    _refuse_unsupported(config)
    tools, strict = gemini_input.tools(body)
    choice, all_strict = _tool_choice(body)
    if all_strict:
        strict = frozenset(tool["function"]["name"] for tool in tools)
    messages = gemini_input.messages(body, asked.seen)
    if not messages:
        raise invalid("contents: there is nothing in its parts.", "contents")
    top_k = fields.number(config, "topK", at_least=0, at_most=fields.MAX_TOKENS)
    return Call(
        dialect=NAME,
        model=model[: fields.MAX_NAME_CHARS],
        messages=messages,
        tools=tools,
        strict_tools=strict,
        tool_choice=choice,
        output_format=_output_format(config),
        num_choices=fields.integer(config, "candidateCount", at_least=1, at_most=fields.MAX_CHOICES)
        or 1,
        max_new_tokens=fields.integer(
            config, "maxOutputTokens", at_least=1, at_most=fields.MAX_TOKENS
        ),
        temperature=fields.number(config, "temperature", at_least=0, at_most=2),
        top_p=fields.number(config, "topP", at_least=0, at_most=1),
        top_k=None if top_k is None else int(top_k),
        stop=fields.stops(config, "stopSequences"),
        stream=method == STREAM_METHOD,
        logprobs=fields.boolean(config, "responseLogprobs"),
        num_bytes=len(asked.raw),
        echo={"sse": asked.query.get("alt") == "sse"},
    )


def _refuse_unsupported(config: fields.Body) -> None:
    at = "generationConfig."
    if config.get("logprobs"):
        raise invalid("only the logprobs of the sampled tokens are known.", at + "logprobs")
    if config.get("responseFormat"):
        raise invalid("use responseMimeType and responseJsonSchema.", at + "responseFormat")
    modalities = fields.items(config, "responseModalities", where=at, at_most=fields.MAX_PARTS)
    if any(modality not in ("TEXT", "text") for modality in modalities):
        raise invalid("the policy answers with text only.", at + "responseModalities")


def _tool_choice(body: fields.Body) -> tuple[ToolChoice, bool]:
    """And whether all calls are to keep to their schemas."""
    where = "toolConfig.functionCallingConfig"
    config = camel(body.get("toolConfig") or {}, "toolConfig")
    config = camel(config.get("functionCallingConfig") or {}, where)
    mode = fields.text(config, "mode", where=where + ".", max_chars=32, default="AUTO").upper()
    allowed = fields.items(
        config, "allowedFunctionNames", where=where + ".", at_most=fields.MAX_TOOLS
    )
    names = tuple(fields.name({"": name}, "", where=where) for name in allowed)
    if mode == "NONE":
        return ToolChoice("none"), False
    if mode == "ANY":
        return ToolChoice("required", names), False
    if mode in ("AUTO", "VALIDATED", "MODE_UNSPECIFIED"):
        return ToolChoice("auto", names), mode == "VALIDATED"
    raise invalid(f"{where}.mode may be AUTO, ANY, NONE or VALIDATED.", f"{where}.mode")


def _output_format(config: fields.Body) -> OutputFormat:
    kind = config.get("responseMimeType") or "text/plain"
    schema = config.get("responseJsonSchema") or json_schema(
        config.get("responseSchema"), closed=True
    )
    if schema is not None:
        return OutputFormat("json_schema", fields.as_mapping(schema, "responseSchema"))
    if kind == "application/json":
        return OutputFormat("json_object")
    if kind != "text/plain":
        raise invalid(
            f"generationConfig.responseMimeType may be text/plain or application/json, not {kind}.",
            "generationConfig.responseMimeType",
        )
    return OutputFormat()


# Answers


def answer(answer_id: str, call: Call, choices: Sequence[Choice], usage: Usage) -> bytes:
    candidates = [_candidate(call, index, choice) for index, choice in enumerate(choices)]
    return orjson.dumps(_response(answer_id, call, candidates, usage))


def counted(num_tokens: int) -> dict[str, Any]:
    return {"totalTokens": num_tokens}


def stream(answer_id: str, call: Call, num_prompt_tokens: int) -> Stream:
    return Stream(answer_id, call, num_prompt_tokens)


class Stream:
    """Responses that each hold a piece, as events or as the entries of one JSON array."""

    def __init__(self, answer_id: str, call: Call, num_prompt_tokens: int) -> None:
        self._answer_id = answer_id
        self._call = call
        self._usage = Usage(num_prompt_tokens)
        self._is_sse = call.echo["sse"]
        self._has_begun = False
        self._last: dict[int, Choice] = {}  # what ended each candidate
        self.media_type = EVENTS if self._is_sse else JSON

    def events(self, index: int, delta: Delta) -> Iterator[bytes]:
        if delta.parts or delta.logprobs:
            piece = Choice(delta.parts, delta.logprobs)
            candidates = [_candidate(self._call, index, piece)]
            yield self._entry(_response(self._answer_id, self._call, candidates, self._usage))
        if delta.finish_reason is not None:
            self._last[index] = Choice(finish_reason=delta.finish_reason)

    def end(self, usage: Usage) -> bytes:
        candidates = [_candidate(self._call, i, last) for i, last in sorted(self._last.items())]
        entry = self._entry(_response(self._answer_id, self._call, candidates, usage))
        return entry if self._is_sse else entry + b"]"

    def failure(self, refusal: Refusal) -> bytes:
        entry = self._entry({"error": _error(refusal)})
        return entry if self._is_sse else entry + b"]"

    def _entry(self, body: dict[str, Any]) -> bytes:
        if self._is_sse:
            return b"data: " + orjson.dumps(body) + b"\r\n\r\n"
        before = b",\r\n" if self._has_begun else b"["
        self._has_begun = True
        return before + orjson.dumps(body)


def error_status(refusal: Refusal) -> int:
    return refusal.status


def error_body(refusal: Refusal) -> bytes:
    return orjson.dumps({"error": _error(refusal)})


_STATUSES = {
    401: "UNAUTHENTICATED",
    404: "NOT_FOUND",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


def _error(refusal: Refusal) -> dict[str, Any]:
    other = "INTERNAL" if refusal.status >= 500 else "INVALID_ARGUMENT"
    message = str(refusal)
    if refusal.reason is Reason.INVALID_REQUEST and refusal.param:
        message = f"{refusal.param}: {message}"  # Google's errors have no field for it
    if isinstance(refusal, ContextTooLong):  # in the words that agents look for
        message = (
            f"The input token count ({refusal.num_tokens}) exceeds the maximum number of tokens "
            f"allowed ({refusal.max_model_len})."
        )
    status = _STATUSES.get(refusal.status, other)
    return {"code": refusal.status, "message": message, "status": status}


def _response(
    answer_id: str, call: Call, candidates: list[dict[str, Any]], usage: Usage
) -> dict[str, Any]:
    return {
        "candidates": candidates,
        "usageMetadata": {
            "promptTokenCount": usage.num_prompt_tokens,
            "candidatesTokenCount": usage.num_sampled_tokens,
            "totalTokenCount": usage.num_prompt_tokens + usage.num_sampled_tokens,
        },
        "modelVersion": call.model,
        "responseId": answer_id,
    }


def _candidate(call: Call, index: int, choice: Choice) -> dict[str, Any]:
    parts = [_part(part) for part in choice.parts or [""]]
    candidate: dict[str, Any] = {"content": {"role": "model", "parts": parts}, "index": index}
    if choice.finish_reason is not None:
        candidate["finishReason"] = "MAX_TOKENS" if choice.finish_reason == "length" else "STOP"
    if call.logprobs:
        candidate["logprobsResult"] = {"chosenCandidates": _logprobs(choice.logprobs)}
    return candidate


def _part(part: Part) -> dict[str, Any]:
    if isinstance(part, Thought):
        return {"text": part.text, "thought": True}
    if isinstance(part, str):
        return {"text": part}
    return {"functionCall": {"id": part.id, "name": part.name, "args": part.parsed_arguments()}}


def _logprobs(logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    return [{"token": t.token, "logProbability": t.logprob} for t in logprobs]
