"""OpenAI's Chat Completions: `POST /v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import orjson

from areal_sub.proxy.dialects import EVENTS, Asked, fields, openai_errors
from areal_sub.proxy.dialects.openai_errors import error_body as error_body
from areal_sub.proxy.dialects.openai_errors import error_status as error_status
from areal_sub.proxy.dialects.transcript import Transcript
from areal_sub.proxy.neutral import (
    Call,
    Choice,
    Delta,
    Message,
    OutputFormat,
    Role,
    TokenLogprob,
    ToolCall,
    ToolChoice,
    Usage,
)
from areal_sub.proxy.refusals import Refusal, invalid

NAME = "chat"
ID_PREFIX = "chatcmpl-"
REQUEST_ID = "x-request-id"

_REFUSED = {
    "top_logprobs": "top_logprobs is not available; logprobs is.",
    "functions": "functions is deprecated; use tools.",
    "audio": "audio: the policy answers with text only.",
    "web_search_options": "web_search_options: nobody searches the web here; give a function.",
}

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


def parse(asked: Asked) -> Call:
    body = fields.load(asked.raw)
    for key, why in _REFUSED.items():
        # An empty object of options asks for a search, too.
        if body.get(key) or body.get(key) == {}:
            raise invalid(why, key)
    modalities = fields.items(body, "modalities", at_most=fields.MAX_PARTS)
    if any(modality != "text" for modality in modalities):
        raise invalid("modalities: the policy answers with text only.", "modalities")
    messages = fields.items(body, "messages", at_most=fields.MAX_MESSAGES)
    if not messages:
        raise invalid("Missing required parameter: 'messages'.", "messages")
    tools = [
        _tool(tool, f"tools[{index}]")
        for index, tool in enumerate(fields.items(body, "tools", at_most=fields.MAX_TOOLS))
    ]
    limits = {"at_least": 1, "at_most": fields.MAX_TOKENS}
    max_tokens = fields.integer(body, "max_tokens", **limits)
    max_new_tokens = fields.integer(body, "max_completion_tokens", **limits)
    stream_options = fields.mapping(body, "stream_options")
    return Call(
        dialect=NAME,
        model=fields.text(body, "model", max_chars=fields.MAX_NAME_CHARS, default="policy"),
        messages=asked.seen.read(messages, _Reader()),
        tools=tuple(tool for tool, _ in tools),
        strict_tools=frozenset(tool["function"]["name"] for tool, strict in tools if strict),
        tool_choice=_tool_choice(body),
        parallel_tool_calls=body.get("parallel_tool_calls") is None
        or fields.boolean(body, "parallel_tool_calls"),
        output_format=_output_format(fields.mapping(body, "response_format")),
        num_choices=fields.integer(body, "n", at_least=1, at_most=fields.MAX_CHOICES) or 1,
        max_new_tokens=max_tokens if max_new_tokens is None else max_new_tokens,
        temperature=fields.number(body, "temperature", at_least=0, at_most=2),
        top_p=fields.number(body, "top_p", at_least=0, at_most=1),
        top_k=fields.integer(body, "top_k", at_least=0, at_most=fields.MAX_TOKENS),
        stop=fields.stops(body, "stop"),
        stream=fields.boolean(body, "stream"),
        include_usage=fields.boolean(stream_options, "include_usage", where="stream_options."),
        logprobs=fields.boolean(body, "logprobs"),
        num_bytes=len(asked.raw),
    )


def _tool_choice(body: fields.Body) -> ToolChoice:
    value = body.get("tool_choice")
    if value in (None, "auto"):
        return ToolChoice()
    if value == "none":
        return ToolChoice("none")
    if value == "required":
        return ToolChoice("required")
    choice = fields.as_mapping(value, "tool_choice")
    if choice.get("type") == "allowed_tools":
        allowed = fields.mapping(choice, "allowed_tools", where="tool_choice.")
        tools = fields.items(allowed, "tools", where="tool_choice.", at_most=fields.MAX_TOOLS)
        names = tuple(_named(tool, f"tool_choice.tools[{i}]") for i, tool in enumerate(tools))
        return ToolChoice("required" if allowed.get("mode") == "required" else "auto", names)
    return ToolChoice("required", (_named(choice, "tool_choice"),))


def _named(value: Any, where: str) -> str:
    function = fields.mapping(fields.as_mapping(value, where), "function", where=where + ".")
    return fields.name(function, "name", where=where + ".function.")


def _output_format(body: fields.Body) -> OutputFormat:
    kind = body.get("type") or "text"
    if kind == "text":
        return OutputFormat()
    if kind == "json_object":
        return OutputFormat("json_object")
    if kind != "json_schema":
        raise invalid(
            f"response_format.type may be text, json_object or json_schema, not {kind!r}.",
            "response_format.type",
        )
    where = "response_format.json_schema."
    given = fields.mapping(body, "json_schema", where="response_format.")
    schema = fields.mapping(given, "schema", where=where)
    strict = fields.boolean(given, "strict", where=where)
    return OutputFormat("json_schema", schema, fields.name(given, "name", where=where), strict)


class _Reader(Transcript):
    def read(self, item: Any, index: int) -> None:
        self.add(_message(item, index))


def _message(value: Any, index: int) -> Message:
    body = fields.as_mapping(value, f"messages[{index}]")
    where = f"messages[{index}]."
    role = _ROLES.get(fields.text(body, "role", where=where, max_chars=32))
    if role is None:
        raise invalid(
            f"Invalid value for '{where}role': use one of {', '.join(_ROLES)}.", where + "role"
        )
    if body.get("function_call"):
        raise invalid(f"{where}function_call is deprecated; use tool_calls.", where + "tool_calls")
    calls = fields.items(body, "tool_calls", where=where, at_most=fields.MAX_TOOL_CALLS)
    if calls and role != "assistant":
        raise invalid(f"{where}tool_calls: only an assistant calls tools.", where + "tool_calls")
    return Message(
        role=role,
        content=fields.joined(body.get("content"), where + "content", ("text", "refusal")),
        tool_calls=tuple(_tool_call(c, f"{where}tool_calls[{i}]") for i, c in enumerate(calls)),
        tool_call_id=fields.text(
            body, "tool_call_id", where=where, max_chars=fields.MAX_NAME_CHARS
        ),
        name=fields.text(body, "name", where=where, max_chars=fields.MAX_NAME_CHARS),
        reasoning=_reasoning(body, where) if role == "assistant" else "",
    )


def _reasoning(body: fields.Body, where: str) -> str:
    """OpenAI has no field for it; these are DeepSeek's and vLLM's (ours), and OpenRouter's."""
    key = "reasoning" if isinstance(body.get("reasoning"), str) else "reasoning_content"
    return fields.text(body, key, where=where, max_chars=fields.MAX_TEXT_CHARS)


def _tool_call(value: Any, where: str) -> ToolCall:
    body = fields.as_mapping(value, where)
    function = fields.mapping(body, "function", where=where + ".")
    where += ".function."
    called = fields.name(function, "name", where=where)
    call_id = fields.text(body, "id", max_chars=fields.MAX_NAME_CHARS)
    return fields.tool_call(call_id, called, function.get("arguments"), where + "arguments")


def _tool(value: Any, where: str) -> tuple[dict[str, Any], bool]:
    body = fields.as_mapping(value, where)
    if body.get("type") != "function":
        raise invalid(f"{where}.type must be 'function'.", f"{where}.type")
    function = fields.mapping(body, "function", where=where + ".")
    return fields.tool(function, f"{where}.function")


# Answers


def answer(answer_id: str, call: Call, choices: Sequence[Choice], usage: Usage) -> bytes:
    return orjson.dumps(
        {
            "id": answer_id,
            "object": "chat.completion",
            "created": int(time.time()),
            "model": call.model,
            "choices": [_choice(call, index, choice) for index, choice in enumerate(choices)],
            "usage": _usage(usage),
            "system_fingerprint": None,
        }
    )


def _choice(call: Call, index: int, choice: Choice) -> dict[str, Any]:
    calls = choice.tool_calls
    message: dict[str, Any] = {
        "role": "assistant",
        "content": choice.text or (None if calls else ""),
        "refusal": None,
    }
    if reasoning := choice.reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = [_call_body(call) for call in calls]
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(choice.logprobs) if call.logprobs else None,
        "finish_reason": choice.finish_reason,
    }


def stream(answer_id: str, call: Call, num_prompt_tokens: int) -> Stream:
    return Stream(answer_id, call)


class Stream:
    """The server-sent events of one streamed completion."""

    media_type = EVENTS

    def __init__(self, answer_id: str, call: Call) -> None:
        self._call = call
        self._head = {
            "id": answer_id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": call.model,
        }
        self._num_calls = [0] * call.num_choices
        self._begun: set[int] = set()

    def events(self, index: int, delta: Delta) -> Iterator[bytes]:
        body: dict[str, Any] = {}
        if index not in self._begun:
            self._begun.add(index)
            text = None if delta.tool_calls else ""
            body = {"role": "assistant", "content": text, "refusal": None}
        if reasoning := delta.reasoning:
            body["reasoning_content"] = reasoning
        if text := delta.text:
            body["content"] = text
        logprobs, is_full = delta.logprobs, bool(text or reasoning)
        for tool_call in delta.tool_calls:
            # Each in a chunk of its own, as OpenAI's are: of several LlamaIndex takes the first,
            # and where there is a text, were it empty, Griptape takes no call.
            if is_full:
                yield self._chunk(index, body, None, logprobs)
                body, logprobs = {}, []
            is_full = True
            body["tool_calls"] = [{"index": self._num_calls[index], **_call_body(tool_call)}]
            self._num_calls[index] += 1
        if body or logprobs:
            yield self._chunk(index, body, None, logprobs)
        if delta.finish_reason is not None:
            yield self._chunk(index, {}, delta.finish_reason, [])

    def end(self, usage: Usage) -> bytes:
        last = b""
        if self._call.include_usage:
            last = _event({**self._head, "choices": [], "usage": _usage(usage)})
        return last + b"data: [DONE]\n\n"

    def failure(self, refusal: Refusal) -> bytes:
        return _event({"error": openai_errors.error(refusal)})

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        finish_reason: str | None,
        logprobs: list[TokenLogprob],
    ) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": _logprobs(logprobs) if logprobs else None,
            "finish_reason": finish_reason,
        }
        chunk = {**self._head, "choices": [choice]}
        if self._call.include_usage:
            chunk["usage"] = None
        return _event(chunk)


def _call_body(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _logprobs(logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    content = [
        {"token": t.token, "logprob": t.logprob, "bytes": list(t.raw), "top_logprobs": []}
        for t in logprobs
    ]
    return {"content": content, "refusal": None}


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_sampled_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_sampled_tokens,
    }


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"
