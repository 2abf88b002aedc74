"""OpenAI's Responses: `POST /v1/responses`, and `GET` and `DELETE` of `/v1/responses/{id}`.

An answer is kept for the rollout unless `store` is false, for `previous_response_id`, for item
references and for `GET`. Items have ids made from their answer's: `msg_{answer}_{number}`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

from areal_sub.proxy.dialects import EVENTS, Asked, fields, openai_errors, responses_input
from areal_sub.proxy.dialects.openai_errors import error_body as error_body
from areal_sub.proxy.dialects.openai_errors import error_status as error_status
from areal_sub.proxy.dialects.responses_tools import Tools
from areal_sub.proxy.kept import KeptAnswers
from areal_sub.proxy.neutral import (
    Call,
    Choice,
    Delta,
    FinishReason,
    Message,
    OutputFormat,
    Thought,
    TokenLogprob,
    ToolCall,
    ToolChoice,
    Usage,
)
from areal_sub.proxy.refusals import Reason, Refusal, invalid

NAME = "responses"
ID_PREFIX = "resp_"
REQUEST_ID = "x-request-id"

_REFUSED = {
    "background": "answers are given at once; leave background out.",
    "conversation": "conversations are not kept; use previous_response_id or send the items.",
    "prompt": "there are no stored prompts; send instructions and input.",
    "context_management": "the conversation is not compacted here; leave it out.",
    "top_logprobs": "the likeliest other tokens are not known; leave it out.",
}


def parse(asked: Asked) -> Call:
    body = fields.load(asked.raw)
    for key, why in _REFUSED.items():
        if body.get(key):
            raise invalid(f"{key}: {why}", key)
    # With either nothing is left out: an input that is too long is refused, as the answer says.
    if body.get("truncation") not in (None, "disabled", "auto"):
        raise invalid("truncation may be 'disabled' or 'auto'.", "truncation")
    tools = Tools(body)
    previous = _previous(body, asked.kept)
    given = responses_input.messages(body, asked)
    if not given:
        raise invalid("Missing required parameter: 'input'.", "input")
    instructions = fields.text(body, "instructions", max_chars=fields.MAX_TEXT_CHARS)
    text = fields.mapping(body, "text")
    include = fields.items(body, "include", at_most=fields.MAX_PARTS)
    return Call(
        dialect=NAME,
        model=fields.text(body, "model", max_chars=fields.MAX_NAME_CHARS, default="policy"),
        messages=((Message("system", instructions),) if instructions else ()) + previous + given,
        tools=tuple(tools.shown),
        strict_tools=frozenset(tools.strict),
        tool_choice=_tool_choice(body, tools),
        parallel_tool_calls=body.get("parallel_tool_calls") is None
        or fields.boolean(body, "parallel_tool_calls"),
        output_format=_output_format(fields.mapping(text, "format", where="text.")),
        max_new_tokens=fields.integer(
            body, "max_output_tokens", at_least=1, at_most=fields.MAX_TOKENS
        ),
        temperature=fields.number(body, "temperature", at_least=0, at_most=2),
        top_p=fields.number(body, "top_p", at_least=0, at_most=1),
        stream=fields.boolean(body, "stream"),
        logprobs="message.output_text.logprobs" in include,
        num_bytes=len(asked.raw),
        # What instructions say holds for this call only.
        conversation=previous + given if body.get("store") is not False else None,
        echo={
            "tools": tools,
            "seals": "reasoning.encrypted_content" in include,
            "body": _echo(body),
        },
    )


def _previous(body: fields.Body, kept: KeptAnswers) -> tuple[Message, ...]:
    name = fields.text(body, "previous_response_id", max_chars=fields.MAX_NAME_CHARS)
    if not name:
        return ()
    previous = kept.get(name)
    if previous is None:
        raise invalid(
            f"Previous response with id '{name}' not found: it is not this rollout's, was not "
            "stored, or was too long ago.",
            "previous_response_id",
        )
    return previous.conversation


def _tool_choice(body: fields.Body, tools: Tools) -> ToolChoice:
    value = body.get("tool_choice")
    if value in (None, "auto"):
        return ToolChoice()
    if value == "none":
        return ToolChoice("none")
    if value == "required":
        return ToolChoice("required")
    choice = fields.as_mapping(value, "tool_choice")
    if choice.get("type") == "allowed_tools":
        allowed = fields.items(choice, "tools", where="tool_choice.", at_most=fields.MAX_TOOLS)
        names = tuple(_named(tool, f"tool_choice.tools[{i}]") for i, tool in enumerate(allowed))
        return ToolChoice("required" if choice.get("mode") == "required" else "auto", names)
    return ToolChoice("required", (_named(choice, "tool_choice"),))


def _named(value: Any, where: str) -> str:
    choice = fields.as_mapping(value, where)
    if choice.get("type") not in ("function", "custom"):
        raise invalid(
            f"{where}.type: {choice.get('type')!r} is no tool of the policy's.", f"{where}.type"
        )
    return fields.name(choice, "name", where=where + ".")


def _output_format(form: fields.Body) -> OutputFormat:
    kind = form.get("type") or "text"
    if kind == "text":
        return OutputFormat()
    if kind == "json_object":
        return OutputFormat("json_object")
    if kind != "json_schema":
        raise invalid(
            f"text.format.type may be text, json_object or json_schema, not {kind!r}.",
            "text.format.type",
        )
    where = "text.format."
    schema = fields.mapping(form, "schema", where=where)
    strict = fields.boolean(form, "strict", where=where)
    return OutputFormat("json_schema", schema, fields.name(form, "name", where=where), strict)


_DEFAULTS: dict[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
    "user": None,
}


# JSON, of what an answer repeats of its call: a streamed one does so three times.
MAX_ECHO_BYTES = 2**19


def _echo(body: fields.Body) -> dict[str, Any]:
    echo = {k: default if body.get(k) is None else body[k] for k, default in _DEFAULTS.items()}
    if len(orjson.dumps(echo)) > MAX_ECHO_BYTES:
        sizes = {key: len(orjson.dumps(value)) for key, value in echo.items()}
        largest = max(sizes, key=sizes.__getitem__)
        raise invalid(
            f"What an answer repeats of the request ({largest} and others) is larger than "
            f"{MAX_ECHO_BYTES} bytes together.",
            largest,
        )
    return echo


# Answers


def answer(answer_id: str, call: Call, choices: Sequence[Choice], usage: Usage) -> bytes:
    stream = Stream(answer_id, call)
    for _ in stream.events(0, choices[0]):
        pass
    return orjson.dumps(stream.response(stream.ending(), usage))


def counted(num_tokens: int) -> dict[str, Any]:
    return {"object": "response.input_tokens", "input_tokens": num_tokens}


def kept_answer(asked: Asked) -> bytes:
    kept = asked.kept.get(asked.path["name"])
    if kept is None:
        raise unknown(asked)
    return kept.body


def unknown(asked: Asked) -> Refusal:
    return Refusal(
        Reason.UNKNOWN_ANSWER, f"Response with id '{asked.path['name'][:100]}' not found."
    )


def stream(answer_id: str, call: Call, num_prompt_tokens: int) -> Stream:
    return Stream(answer_id, call)


class Stream:
    """The server-sent events of one response: items one after the other, each with its parts."""

    media_type = EVENTS

    def __init__(self, answer_id: str, call: Call) -> None:
        self._answer_id = answer_id
        self._call = call
        self._created_at = int(time.time())
        self._output: list[dict[str, Any]] = []  # items that are done
        self._open: dict[str, Any] | None = None  # the one that text is being added to
        self._num_events = 0
        self._finish_reason: FinishReason | None = None

    def events(self, index: int, delta: Delta) -> Iterator[bytes]:
        if not self._num_events:
            for kind in ("response.created", "response.in_progress"):
                yield self._event(kind, response=self.response("in_progress", None))
        for part in delta.parts:
            if isinstance(part, Thought):
                yield from self._add_text("reasoning", part.text, [])
            elif isinstance(part, str):
                yield from self._add_text("message", part, delta.logprobs)
            else:
                yield from self._close()
                yield from self._add_call(part)
        if delta.finish_reason is not None:
            self._finish_reason = delta.finish_reason
            if self._open is None and not self._output:
                yield from self._begin("message")  # an answer that says nothing says that
            yield from self._close()

    def end(self, usage: Usage) -> bytes:
        status = self.ending()
        return self._event(f"response.{status}", response=self.response(status, usage))

    def failure(self, refusal: Refusal) -> bytes:
        error = openai_errors.error(refusal)
        failed = self.response("failed", None)
        code = "server_error" if refusal.status >= 500 else error["code"]
        failed["error"] = {"code": code or error["type"], "message": error["message"]}
        last = self._event("response.failed", response=failed)
        flat = {key: error[key] for key in ("code", "message", "param")}
        return last + self._event("error", **flat, error=error)

    def ending(self) -> str:
        return "incomplete" if self._finish_reason == "length" else "completed"

    def response(self, status: str, usage: Usage | None) -> dict[str, Any]:
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self._answer_id,
            "object": "response",
            "created_at": self._created_at,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": incomplete,
            "model": self._call.model,
            "output": list(self._output),
            "service_tier": "default",
            "top_logprobs": 0,
            "truncation": "disabled",
            "usage": _usage(usage) if usage else None,
            **self._call.echo["body"],
        }

    def _add_text(self, kind: str, text: str, logprobs: list[TokenLogprob]) -> Iterator[bytes]:
        if self._open is None or self._open["type"] != kind:
            yield from self._close()
            yield from self._begin(kind)
        assert self._open is not None
        part = self._open["content"][0]
        part["text"] += text
        more: dict[str, Any] = {}
        if kind == "message":
            more["logprobs"] = _logprobs(logprobs)
            part["logprobs"] += more["logprobs"]
        yield self._part_event(f"{part['type']}.delta", delta=text, **more)

    def _begin(self, kind: str) -> Iterator[bytes]:
        item: dict[str, Any] = {"id": self._item_id(kind), "type": kind, "status": "in_progress"}
        if kind == "message":
            item |= {"role": "assistant", "content": []}
            part: dict[str, Any] = {
                "type": "output_text",
                "text": "",
                "annotations": [],
                "logprobs": [],
            }
        else:
            item |= {"summary": [], "content": [], "encrypted_content": None}
            part = {"type": "reasoning_text", "text": ""}
        yield self._item_event("added", item)
        self._open = {**item, "content": [part]}
        yield self._part_event("content_part.added", part=part)

    def _close(self) -> Iterator[bytes]:
        if self._open is None:
            return
        item = self._open
        part = item["content"][0]
        done = {key: part[key] for key in ("text", "logprobs") if key in part}
        yield self._part_event(f"{part['type']}.done", **done)
        yield self._part_event("content_part.done", part=part)
        item["status"] = self._item_status()
        if item["type"] == "reasoning" and self._call.echo["seals"]:
            item["encrypted_content"] = responses_input.sealed(part["text"])
        yield self._item_event("done", item)
        self._open = None
        self._output.append(item)

    def _add_call(self, call: ToolCall) -> Iterator[bytes]:
        tools: Tools = self._call.echo["tools"]
        item = tools.item(call, self._item_id("call"), "completed")
        field, name = _WRITTEN.get(item["type"], ("", ""))
        if not field:
            yield self._item_event("added", {**item, "status": "in_progress"})
        else:
            yield self._item_event("added", {**item, "status": "in_progress", field: ""})
            at = {"item_id": item["id"], "output_index": len(self._output)}
            yield self._event(f"response.{name}.delta", delta=item[field], **at)
            yield self._event(f"response.{name}.done", **{field: item[field]}, **at)
        yield self._item_event("done", item)
        self._output.append(item)

    def _item_status(self) -> str:
        return "incomplete" if self._finish_reason == "length" else "completed"

    def _item_id(self, kind: str) -> str:
        answer = self._answer_id.removeprefix(ID_PREFIX)
        return f"{_ITEM_PREFIXES[kind]}_{answer}_{len(self._output)}"

    def _item_event(self, name: str, item: Mapping[str, Any]) -> bytes:
        return self._event(
            f"response.output_item.{name}", output_index=len(self._output), item=item
        )

    def _part_event(self, name: str, **body: Any) -> bytes:
        assert self._open is not None
        return self._event(
            f"response.{name}",
            item_id=self._open["id"],
            output_index=len(self._output),
            content_index=0,
            **body,
        )

    def _event(self, kind: str, **body: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._num_events, **body}
        self._num_events += 1
        return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps(event) + b"\n\n"


_ITEM_PREFIXES = {"message": "msg", "reasoning": "rs", "call": "fc"}
# What of a call is streamed: the item's field, and the events' name.
_WRITTEN = {
    "function_call": ("arguments", "function_call_arguments"),
    "custom_tool_call": ("input", "custom_tool_call_input"),
}


def _logprobs(logprobs: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    return [
        {"token": t.token, "logprob": t.logprob, "bytes": list(t.raw), "top_logprobs": []}
        for t in logprobs
    ]


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage.num_sampled_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.num_prompt_tokens + usage.num_sampled_tokens,
    }
