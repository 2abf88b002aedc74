"""OpenAI's Chat Completions.

`parse` is strict about what it reads and blind to the rest: unknown fields are ignored, and a field
that asks for what the proxy cannot do (images) is refused by name, never silently dropped.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import orjson

from areal_sub.proxy.dialects import fields
from areal_sub.proxy.neutral import (
    MAX_DEPTH,
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
    is_deeper_than,
)
from areal_sub.proxy.refusals import Reason, Refusal, invalid

NAME = "chat"

MAX_MESSAGES = 4096
MAX_PARTS = 1024  # of one message's content
MAX_TOOLS = 512
MAX_TOOL_CALLS = 128  # of one message
MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_NAME_CHARS = 256
MAX_TEXT_CHARS = 2**24
MAX_TOKENS = 2**31 - 1

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


def parse(raw: bytes) -> Call:
    """Raises `Refusal` naming the field."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise invalid(f"We could not parse the JSON body of your request: {error}") from None
    if not isinstance(body, dict):
        raise invalid("The body of the request must be a JSON object.")
    if is_deeper_than(body, MAX_DEPTH):
        raise invalid(f"The body of the request nests deeper than {MAX_DEPTH}.")
    _refuse_unsupported(body)
    messages = fields.items(body, "messages", at_most=MAX_MESSAGES)
    if not messages:
        raise invalid("Missing required parameter: 'messages'.", "messages")
    tools = tuple(
        _tool(tool, f"tools[{index}]")
        for index, tool in enumerate(fields.items(body, "tools", at_most=MAX_TOOLS))
    )
    max_tokens = fields.integer(body, "max_tokens", at_least=1, at_most=MAX_TOKENS)
    max_new_tokens = fields.integer(body, "max_completion_tokens", at_least=1, at_most=MAX_TOKENS)
    stream_options = fields.mapping(body, "stream_options")
    choice = _tool_choice(body)
    return Call(
        dialect=NAME,
        model=fields.text(body, "model", max_chars=MAX_NAME_CHARS, default="policy"),
        messages=tuple(_message(m, f"messages[{i}]") for i, m in enumerate(messages)),
        tools=tools,
        strict_tools=frozenset(
            tool["function"]["name"] for tool in tools if tool["function"].get("strict") is True
        ),
        tool_choice=choice,
        parallel_tool_calls=body.get("parallel_tool_calls") is None
        or fields.boolean(body, "parallel_tool_calls"),
        output_format=_output_format(fields.mapping(body, "response_format")),
        parse_tool_calls=bool(tools) and choice.mode != "none",
        num_choices=fields.integer(body, "n", at_least=1, at_most=MAX_CHOICES) or 1,
        max_new_tokens=max_tokens if max_new_tokens is None else max_new_tokens,
        temperature=fields.number(body, "temperature", at_least=0, at_most=2),
        top_p=fields.number(body, "top_p", at_least=0, at_most=1),
        top_k=fields.integer(body, "top_k", at_least=0, at_most=MAX_TOKENS),
        stop=_stops(body),
        stream=fields.boolean(body, "stream"),
        include_usage=fields.boolean(stream_options, "include_usage", where="stream_options."),
        logprobs=fields.boolean(body, "logprobs"),
        num_bytes=len(raw),
    )


def _refuse_unsupported(body: fields.Body) -> None:
    if body.get("top_logprobs"):
        raise invalid("top_logprobs is not available; logprobs is.", "top_logprobs")
    if body.get("functions"):
        raise invalid("functions is deprecated; use tools.", "functions")


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
        tools = fields.items(allowed, "tools", where="tool_choice.", at_most=MAX_TOOLS)
        names = tuple(_named(tool, f"tool_choice.tools[{i}]") for i, tool in enumerate(tools))
        return ToolChoice("required" if allowed.get("mode") == "required" else "auto", names)
    return ToolChoice("required", (_named(choice, "tool_choice"),))


def _named(value: Any, where: str) -> str:
    function = fields.mapping(fields.as_mapping(value, where), "function", where=where + ".")
    return _name(function, where + ".function.")


def _name(body: fields.Body, where: str) -> str:
    name = fields.text(body, "name", where=where, max_chars=MAX_NAME_CHARS)
    if not name:
        raise invalid(f"Missing required parameter: '{where}name'.", where + "name")
    return name


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
    return OutputFormat("json_schema", schema, _name(given, where), strict)


def _message(value: Any, where: str) -> Message:
    body = fields.as_mapping(value, where)
    where += "."
    role = _ROLES.get(fields.text(body, "role", where=where, max_chars=32))
    if role is None:
        raise invalid(
            f"Invalid value for '{where}role': use one of {', '.join(_ROLES)}.", where + "role"
        )
    if body.get("function_call"):
        raise invalid(f"{where}function_call is deprecated; use tool_calls.", where + "tool_calls")
    calls = fields.items(body, "tool_calls", where=where, at_most=MAX_TOOL_CALLS)
    if calls and role != "assistant":
        raise invalid(f"{where}tool_calls: only an assistant calls tools.", where + "tool_calls")
    return Message(
        role=role,
        content=_content(body.get("content"), where + "content"),
        tool_calls=tuple(_tool_call(c, f"{where}tool_calls[{i}]") for i, c in enumerate(calls)),
        tool_call_id=fields.text(body, "tool_call_id", where=where, max_chars=MAX_NAME_CHARS),
        name=fields.text(body, "name", where=where, max_chars=MAX_NAME_CHARS),
    )


def _content(value: Any, where: str) -> str:
    """A message's text. Several text parts are one text, one after the other."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    texts = []
    for index, part in enumerate(fields.items({where: value}, where, at_most=MAX_PARTS)):
        at = f"{where}[{index}]"
        part = fields.as_mapping(part, at)
        kind = part.get("type")
        if kind not in ("text", "refusal"):
            raise invalid(f"{at}.type: the policy reads text, not {kind!r}.", f"{at}.type")
        texts.append(fields.text(part, kind, where=at + ".", max_chars=MAX_TEXT_CHARS))
    return "".join(texts)


def _tool_call(value: Any, where: str) -> ToolCall:
    body = fields.as_mapping(value, where)
    function = fields.mapping(body, "function", where=where + ".")
    where += ".function."
    name = fields.text(function, "name", where=where, max_chars=MAX_NAME_CHARS)
    if not name:
        raise invalid(f"Missing required parameter: '{where}name'.", where + "name")
    arguments = function.get("arguments")
    if isinstance(arguments, dict):  # some agents send them as an object
        arguments = orjson.dumps(arguments).decode()
    call = ToolCall(
        id=fields.text(body, "id", max_chars=MAX_NAME_CHARS),
        name=name,
        arguments=fields.text(
            {"arguments": arguments}, "arguments", where=where, max_chars=MAX_TEXT_CHARS
        ),
    )
    if is_deeper_than(call.parsed_arguments(), MAX_DEPTH):
        raise invalid(f"{where}arguments nest deeper than {MAX_DEPTH}.", where + "arguments")
    return call


def _tool(value: Any, where: str) -> dict[str, Any]:
    body = fields.as_mapping(value, where)
    if body.get("type") != "function":
        raise invalid(f"{where}.type must be 'function'.", f"{where}.type")
    function = fields.mapping(body, "function", where=where + ".")
    if not fields.text(function, "name", where=f"{where}.function.", max_chars=MAX_NAME_CHARS):
        raise invalid(
            f"Missing required parameter: '{where}.function.name'.", f"{where}.function.name"
        )
    shown = {key: item for key, item in function.items() if item is not None}
    return {"type": "function", "function": shown}


def _stops(body: fields.Body) -> tuple[str, ...]:
    value = body.get("stop")
    stops = [value] if isinstance(value, str) else fields.items(body, "stop", at_most=MAX_STOPS)
    for index, stop in enumerate(stops):
        if not fields.text({"": stop}, "", where=f"stop[{index}]", max_chars=MAX_STOP_CHARS):
            raise invalid("A stop sequence must not be empty.", f"stop[{index}]")
    return tuple(stops)


# Answers


def answer(completion_id: str, call: Call, choices: Sequence[Choice], usage: Usage) -> bytes:
    return orjson.dumps(
        {
            "id": completion_id,
            "object": "chat.completion",
            "created": int(time.time()),
            "model": call.model,
            "choices": [_choice(call, index, choice) for index, choice in enumerate(choices)],
            "usage": _usage(usage),
        }
    )


def _choice(call: Call, index: int, choice: Choice) -> dict[str, Any]:
    message: dict[str, Any] = {
        "role": "assistant",
        "content": choice.text or (None if choice.tool_calls else ""),
        "refusal": None,
    }
    if choice.tool_calls:
        message["tool_calls"] = [_call_body(tool_call) for tool_call in choice.tool_calls]
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(choice.logprobs) if call.logprobs else None,
        "finish_reason": choice.finish_reason,
    }


class Stream:
    """The server-sent events of one streamed completion."""

    def __init__(self, completion_id: str, call: Call) -> None:
        self._call = call
        self._head = {
            "id": completion_id,
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
            body = {"role": "assistant", "content": "", "refusal": None}
        if delta.text:
            body["content"] = delta.text
        if delta.tool_calls:
            start = self._num_calls[index]
            self._num_calls[index] += len(delta.tool_calls)
            body["tool_calls"] = [
                {"index": start + i, **_call_body(tool_call)}
                for i, tool_call in enumerate(delta.tool_calls)
            ]
        if body or delta.logprobs:
            yield self._chunk(index, body, None, delta.logprobs)
        if delta.finish_reason is not None:
            yield self._chunk(index, {}, delta.finish_reason, [])

    def end(self, usage: Usage) -> bytes:
        last = b""
        if self._call.include_usage:
            last = _event({**self._head, "choices": [], "usage": _usage(usage)})
        return last + b"data: [DONE]\n\n"

    def failure(self, refusal: Refusal) -> bytes:
        """The answer has begun, so the refusal can only be an event; SDKs raise it."""
        return b"data: " + error_body(refusal) + b"\n\n"

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


def error_body(refusal: Refusal) -> bytes:
    error = {
        "message": str(refusal),
        "type": "server_error" if refusal.status >= 500 else "invalid_request_error",
        "param": refusal.param,
        "code": _CODES.get(refusal.reason),
    }
    return orjson.dumps({"error": error})


_CODES = {
    Reason.UNKNOWN_KEY: "invalid_api_key",
    Reason.FINISHED_KEY: "invalid_api_key",
    Reason.FOREIGN_KEY: "invalid_api_key",
    Reason.TOO_LARGE: "request_too_large",
    Reason.CONTEXT_LENGTH: "context_length_exceeded",
    Reason.TURN_LIMIT: "rollout_turn_limit",
    Reason.WRONG_METHOD: "method_not_supported",
    Reason.ENGINE_GONE: "engine_unavailable",
    Reason.ENGINE_FAILED: "engine_failed",
    Reason.DEADLINE: "deadline_exceeded",
}


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
