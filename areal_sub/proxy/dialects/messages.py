"""Anthropic's Messages: `POST /v1/messages` and `/v1/messages/count_tokens`.

Whatever beta is asked for is tolerated. `cache_control`, `metadata`, `service_tier`, the effort and
how much may be thought change nothing here; `context_management` is answered with "no edit was
applied", which is what happened. What Anthropic would run, or the policy cannot read, is refused by
name. Threads, conversations that the server holds, are refused in the way that makes SDKs go on
with the whole history.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import orjson

from areal_sub.proxy.dialects import EVENTS, Asked, fields, messages_tools
from areal_sub.proxy.dialects.transcript import Transcript
from areal_sub.proxy.neutral import (
    Call,
    Choice,
    Delta,
    Message,
    OutputFormat,
    Part,
    Thought,
    ToolCall,
    ToolChoice,
    Usage,
)
from areal_sub.proxy.refusals import ContextTooLong, Reason, Refusal, invalid

NAME = "messages"
ID_PREFIX = "msg_"
REQUEST_ID = "request-id"

# What a thinking block is signed with; agents send it back, and nobody checks it.
SIGNATURE = "YXJlYWwtc3Vi"

_REFUSED = {
    "container": "there are no containers here; leave it out.",
    "mcp_servers": "MCP servers are the agent's to call; give their tools as tools.",
}


class ThreadUnsupported(Refusal):
    def __init__(self) -> None:
        super().__init__(
            Reason.INVALID_REQUEST,
            "thread: conversations are not held here; send all messages without thread.",
            param="thread",
        )


def parse(asked: Asked) -> Call:
    body = fields.load(asked.raw)
    if body.get("thread"):
        raise ThreadUnsupported()
    for key, why in _REFUSED.items():
        if body.get(key):
            raise invalid(f"{key}: {why}", key)
    messages = fields.items(body, "messages", at_most=fields.MAX_MESSAGES)
    if not messages:
        raise invalid("messages: at least one message is required", "messages")
    system = _text(body.get("system"), "system")
    conversation = asked.seen.read(messages, _Reader())
    if conversation and conversation[-1].role == "assistant":
        raise invalid(
            "messages: the last message must not be the assistant's: the policy does not go on "
            "from a prefilled answer.",
            "messages",
        )
    tools = [
        messages_tools.tool(tool, f"tools[{index}]")
        for index, tool in enumerate(fields.items(body, "tools", at_most=fields.MAX_TOOLS))
    ]
    choice = fields.mapping(body, "tool_choice")
    return Call(
        dialect=NAME,
        model=fields.text(body, "model", max_chars=fields.MAX_NAME_CHARS, default="policy"),
        messages=((Message("system", system),) if system else ()) + conversation,
        tools=tuple(tool for tool, _ in tools),
        strict_tools=frozenset(tool["function"]["name"] for tool, strict in tools if strict),
        tool_choice=_tool_choice(choice),
        parallel_tool_calls=not fields.boolean(
            choice, "disable_parallel_tool_use", where="tool_choice."
        ),
        output_format=_output_format(body),
        max_new_tokens=fields.integer(body, "max_tokens", at_least=1, at_most=fields.MAX_TOKENS),
        temperature=fields.number(body, "temperature", at_least=0, at_most=1),
        top_p=fields.number(body, "top_p", at_least=0, at_most=1),
        top_k=fields.integer(body, "top_k", at_least=0, at_most=fields.MAX_TOKENS),
        stop=fields.stops(body, "stop_sequences"),
        stream=fields.boolean(body, "stream"),
        num_bytes=len(asked.raw),
        echo={"context_management": {"applied_edits": []}}
        if body.get("context_management")
        else {},
    )


class _Reader(Transcript):
    def read(self, item: Any, index: int) -> None:
        _read_message(item, f"messages[{index}]", self)


def _read_message(value: Any, where: str, transcript: Transcript) -> None:
    message = fields.as_mapping(value, where)
    role = fields.text(message, "role", where=where + ".", max_chars=32)
    content = message.get("content")
    where += ".content"
    if role == "system":
        transcript.add(Message("system", _text(content, where)))
    elif role == "user":
        _read_user(content, where, transcript)
    elif role == "assistant":
        transcript.close()
        transcript.say("")  # a message, even where it is empty
        for at, block in _blocks(content, where):
            _read_block(block, at, transcript)
    else:
        raise invalid(f"{where}: the role may be user, assistant or system.", where)


def _read_user(content: Any, where: str, transcript: Transcript) -> None:
    """Results of tools are messages of their own; the text between them is one message."""
    texts: list[str] = []

    def say() -> None:
        if texts:
            transcript.add(Message("user", "".join(texts)))
            texts.clear()

    for at, block in _blocks(content, where):
        if block.get("type") == "tool_result":
            say()
            call_id = fields.name(block, "tool_use_id", where=at + ".")
            result = _text(block.get("content"), at + ".content")
            transcript.add(Message("tool", result, tool_call_id=call_id))
        else:
            texts.append(fields.part_text(block, at, ("text",)))
    say()


def _read_block(block: fields.Body, where: str, transcript: Transcript) -> None:
    kind = block.get("type")
    if kind == "thinking":
        transcript.think(
            fields.text(block, "thinking", where=where + ".", max_chars=fields.MAX_TEXT_CHARS)
        )
    elif kind == "redacted_thinking":
        pass  # another provider's, which nobody else can read
    elif kind == "tool_use":
        call_id = fields.text(block, "id", where=where + ".", max_chars=fields.MAX_NAME_CHARS)
        called = fields.name(block, "name", where=where + ".")
        arguments = fields.mapping(block, "input", where=where + ".")
        call = fields.tool_call(call_id, called, arguments, where + ".input")
        transcript.call(call, where)
    else:
        transcript.say(fields.part_text(block, where, ("text",)))


def _blocks(content: Any, where: str) -> Iterator[tuple[str, fields.Body]]:
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    blocks = fields.items({where: content}, where, at_most=fields.MAX_PARTS)
    for index, block in enumerate(blocks):
        at = f"{where}[{index}]"
        yield at, fields.as_mapping(block, at)


def _text(value: Any, where: str) -> str:
    return fields.joined(value, where, ("text",))


def _tool_choice(choice: fields.Body) -> ToolChoice:
    kind = choice.get("type") or "auto"
    if kind == "auto":
        return ToolChoice()
    if kind == "none":
        return ToolChoice("none")
    if kind == "any":
        return ToolChoice("required")
    if kind == "tool":
        return ToolChoice("required", (fields.name(choice, "name", where="tool_choice."),))
    raise invalid("tool_choice.type may be auto, any, tool or none.", "tool_choice.type")


def _output_format(body: fields.Body) -> OutputFormat:
    config = fields.mapping(body, "output_config")
    form = fields.mapping(config, "format", where="output_config.")
    form = form or fields.mapping(body, "output_format")
    if not form:
        return OutputFormat()
    if form.get("type") != "json_schema":
        raise invalid("output_config.format.type may be json_schema.", "output_config.format.type")
    schema = fields.mapping(form, "schema", where="output_config.format.")
    return OutputFormat("json_schema", schema)


# Answers


def answer(answer_id: str, call: Call, choices: Sequence[Choice], usage: Usage) -> bytes:
    [choice] = choices
    message = _message(answer_id, call, usage)
    message["content"] = [_block(part) for part in choice.parts or [""]]
    return orjson.dumps({**message, **_ending(choice)})


def counted(num_tokens: int) -> dict[str, Any]:
    return {"input_tokens": num_tokens}


def stream(answer_id: str, call: Call, num_prompt_tokens: int) -> Stream:
    return Stream(answer_id, call, num_prompt_tokens)


class Stream:
    """The server-sent events of one message: blocks, one after the other."""

    media_type = EVENTS

    def __init__(self, answer_id: str, call: Call, num_prompt_tokens: int) -> None:
        self._message = _message(answer_id, call, Usage(num_prompt_tokens))
        self._num_blocks = 0
        self._open: type | None = None  # what the block that is open holds
        self._has_begun = False
        self._ending: dict[str, Any] = {}

    def events(self, index: int, delta: Delta) -> Iterator[bytes]:
        if not self._has_begun:
            self._has_begun = True
            yield _event("message_start", message=self._message)
        for part in delta.parts:
            if self._open is not type(part) or isinstance(part, ToolCall):
                yield from self._close()
                yield from self._begin(part)
            yield self._delta(part)
        if delta.finish_reason is not None:
            if not self._num_blocks:
                yield from self._begin("")
            yield from self._close()
            self._ending = _ending(delta)

    def end(self, usage: Usage) -> bytes:
        body = {"delta": self._ending, "usage": _usage(usage)}
        body |= {k: v for k, v in self._message.items() if k == "context_management"}
        return _event("message_delta", **body) + _event("message_stop")

    def failure(self, refusal: Refusal) -> bytes:
        return _event("error", error=_error(refusal))

    def _begin(self, part: Part) -> Iterator[bytes]:
        block = _block(part)
        block |= {"input": {}} if isinstance(part, ToolCall) else {}
        block |= {"text": ""} if isinstance(part, str) else {}
        block |= {"thinking": "", "signature": ""} if isinstance(part, Thought) else {}
        yield _event("content_block_start", index=self._num_blocks, content_block=block)
        self._open = type(part)
        self._num_blocks += 1

    def _delta(self, part: Part) -> bytes:
        if isinstance(part, ToolCall):
            delta = {"type": "input_json_delta", "partial_json": part.arguments}
        elif isinstance(part, str):
            delta = {"type": "text_delta", "text": part}
        else:
            delta = {"type": "thinking_delta", "thinking": part.text}
        return _event("content_block_delta", index=self._num_blocks - 1, delta=delta)

    def _close(self) -> Iterator[bytes]:
        if self._open is None:
            return
        index = self._num_blocks - 1
        if self._open is Thought:
            delta = {"type": "signature_delta", "signature": SIGNATURE}
            yield _event("content_block_delta", index=index, delta=delta)
        yield _event("content_block_stop", index=index)
        self._open = None


def error_status(refusal: Refusal) -> int:
    return 529 if refusal.reason is Reason.ENGINE_GONE else refusal.status


def error_body(refusal: Refusal) -> bytes:
    return orjson.dumps({"type": "error", "error": _error(refusal)})


_ERROR_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    504: "timeout_error",
    529: "overloaded_error",
}


def _error(refusal: Refusal) -> dict[str, Any]:
    status = error_status(refusal)
    kind = _ERROR_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    message = str(refusal)
    if isinstance(refusal, ContextTooLong):  # in the words that agents look for
        message = (
            f"prompt is too long: {refusal.num_tokens} tokens > {refusal.max_model_len} maximum"
        )
    error: dict[str, Any] = {"type": kind, "message": message}
    if isinstance(refusal, ThreadUnsupported):
        details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
        error["details"] = details
    return error


def _message(answer_id: str, call: Call, usage: Usage) -> dict[str, Any]:
    return {
        "id": answer_id,
        "type": "message",
        "role": "assistant",
        "model": call.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage(usage),
        **call.echo,
    }


def _block(part: Part) -> dict[str, Any]:
    if isinstance(part, Thought):
        return {"type": "thinking", "thinking": part.text, "signature": SIGNATURE}
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "tool_use", "id": part.id, "name": part.name, "input": part.parsed_arguments()}


def _ending(choice: Choice) -> dict[str, Any]:
    reason = {"length": "max_tokens", "tool_calls": "tool_use"}.get(
        choice.finish_reason or "", "end_turn"
    )
    if reason == "end_turn" and choice.stop_sequence is not None:
        reason = "stop_sequence"
    stop_sequence = choice.stop_sequence if reason == "stop_sequence" else None
    return {"stop_reason": reason, "stop_sequence": stop_sequence}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt_tokens,
        "output_tokens": usage.num_sampled_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
    }


def _event(kind: str, **body: Any) -> bytes:
    event = {"type": kind, **body}
    return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n"
