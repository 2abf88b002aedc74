"""Each dialect as an agent sees it: a conversation to a request, an answer back to what was said.

A conversation is a list of what was said: ("user", text), ("assistant", parts) and
("tool", call, text), where parts are a dialect's answer in neutral form.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

from areal_sub.proxy.dialects import Asked, chat, gemini, messages, responses
from areal_sub.proxy.neutral import Choice, Part, Thought, ToolCall

Said = tuple[Any, ...]
PARAMETERS = {"type": "object"}


def joined(parts: Sequence[Part]) -> list[Part]:
    choice = Choice()
    for part in parts:
        choice.append(part)
    return choice.parts


def events(raw: bytes) -> list[Any]:
    """The data of server-sent events."""
    lines = raw.replace(b"\r\n", b"\n").split(b"\n")
    data = [line[6:] for line in lines if line.startswith(b"data: ")]
    return [json.loads(each) for each in data if each != b"[DONE]"]


class Chat:
    dialect = chat

    def asked(self, said: list[Said], tools: bool, stream: bool, **more: Any) -> Asked:
        function = {"name": "calc", "parameters": PARAMETERS}
        body = {"messages": [self._message(*each) for each in said], "stream": stream, **more}
        if tools:
            body["tools"] = [{"type": "function", "function": function}]
        return Asked(json.dumps(body).encode())

    def _message(self, role: str, *what: Any) -> dict[str, Any]:
        if role == "user":
            return {"role": role, "content": what[0]}
        if role == "tool":
            return {"role": role, "tool_call_id": what[0].id, "content": what[1]}
        whole = Choice(list(what[0]))
        calls = [
            {"id": c.id, "function": {"name": c.name, "arguments": c.arguments}}
            for c in whole.tool_calls
        ]
        text = {"content": whole.text, "reasoning_content": whole.reasoning}
        return {"role": role, **text, "tool_calls": calls}

    def said(self, raw: bytes) -> list[Part]:
        return self._parts(json.loads(raw)["choices"][-1]["message"])

    def streamed(self, raw: bytes) -> list[Part]:
        return joined(
            [part for e in events(raw) for c in e["choices"] for part in self._parts(c["delta"])]
        )

    def _parts(self, message: dict[str, Any]) -> list[Part]:
        parts: list[Part] = [
            Thought(message.get("reasoning_content") or ""),
            message.get("content") or "",
        ]
        for call in message.get("tool_calls") or ():
            function = call["function"]
            parts.append(ToolCall(call["id"], function["name"], function["arguments"]))
        return joined(parts)


class Responses:
    dialect = responses

    def asked(self, said: list[Said], tools: bool, stream: bool, **more: Any) -> Asked:
        assert not more
        items = [item for each in said for item in self._items(*each)]
        body: dict[str, Any] = {"input": items, "stream": stream, "store": False}
        if tools:
            body["tools"] = [{"type": "function", "name": "calc", "parameters": PARAMETERS}]
        return Asked(json.dumps(body).encode())

    def _items(self, role: str, *what: Any) -> list[dict[str, Any]]:
        if role == "user":
            return [{"role": role, "content": [{"type": "input_text", "text": what[0]}]}]
        if role == "tool":
            result = {"call_id": what[0].id, "output": what[1]}
            return [{"type": "function_call_output", **result}]
        # An answer that said nothing is a message that says nothing.
        return [self._item(part) for part in what[0] or [""]]

    def _item(self, part: Part) -> dict[str, Any]:
        if isinstance(part, Thought):
            sealed = "areal-sub:" + base64.b64encode(part.text.encode()).decode()
            return {"type": "reasoning", "summary": [], "encrypted_content": sealed}
        if isinstance(part, str):
            text = {"type": "output_text", "text": part}
            return {"type": "message", "role": "assistant", "content": [text]}
        call = {"call_id": part.id, "name": part.name, "arguments": part.arguments}
        return {"type": "function_call", **call}

    def said(self, raw: bytes) -> list[Part]:
        return self._parts(json.loads(raw))

    def streamed(self, raw: bytes) -> list[Part]:
        *_, last = events(raw)
        assert last["type"] in ("response.completed", "response.incomplete")
        return self._parts(last["response"])

    def _parts(self, response: dict[str, Any]) -> list[Part]:
        parts: list[Part] = []
        for item in response["output"]:
            if item["type"] == "function_call":
                parts.append(ToolCall(item["call_id"], item["name"], item["arguments"]))
            else:
                text = "".join(part["text"] for part in item["content"])
                parts.append(Thought(text) if item["type"] == "reasoning" else text)
        return joined(parts)


class Messages:
    dialect = messages

    def asked(self, said: list[Said], tools: bool, stream: bool, **more: Any) -> Asked:
        body: dict[str, Any] = {"messages": [self._message(*e) for e in said], "stream": stream}
        if "stop" in more:
            body["stop_sequences"] = more["stop"]
        if tools:
            body["tools"] = [{"name": "calc", "input_schema": PARAMETERS}]
        return Asked(json.dumps(body).encode())

    def _message(self, role: str, *what: Any) -> dict[str, Any]:
        if role == "user":
            return {"role": role, "content": what[0]}
        if role == "tool":
            result = {"type": "tool_result", "tool_use_id": what[0].id, "content": what[1]}
            return {"role": "user", "content": [result]}
        return {"role": role, "content": [self._block(part) for part in what[0]]}

    def _block(self, part: Part) -> dict[str, Any]:
        if isinstance(part, Thought):
            return {"type": "thinking", "thinking": part.text, "signature": "x"}
        if isinstance(part, str):
            return {"type": "text", "text": part}
        call = {"id": part.id, "name": part.name, "input": json.loads(part.arguments)}
        return {"type": "tool_use", **call}

    def said(self, raw: bytes) -> list[Part]:
        return joined([self._part(block) for block in json.loads(raw)["content"]])

    def streamed(self, raw: bytes) -> list[Part]:
        parts: list[Part] = []
        for event in events(raw):
            if event["type"] == "content_block_start":
                block = event["content_block"]
                written = ""
            elif event["type"] == "content_block_delta":
                delta = event["delta"]
                for key in ("text", "thinking"):
                    block[key] = block.get(key, "") + delta.get(key, "")
                written += delta.get("partial_json", "")
            elif event["type"] == "content_block_stop":
                parts.append(
                    self._part(block | ({"input": json.loads(written)} if written else {}))
                )
        assert event["type"] == "message_stop"
        return joined(parts)

    def _part(self, block: dict[str, Any]) -> Part:
        if block["type"] == "tool_use":
            return ToolCall(block["id"], block["name"], json.dumps(block["input"]))
        return Thought(block["thinking"]) if block["type"] == "thinking" else block["text"]


class Gemini:
    dialect = gemini

    def asked(self, said: list[Said], tools: bool, stream: bool, **more: Any) -> Asked:
        body: dict[str, Any] = {"contents": [self._content(*each) for each in said]}
        body["generation_config"] = {"stop_sequences": more.get("stop")}
        if tools:
            declared = {"name": "calc", "parametersJsonSchema": PARAMETERS}
            body["tools"] = [{"functionDeclarations": [declared]}]
        method = "streamGenerateContent" if stream else "generateContent"
        return Asked(json.dumps(body).encode(), {"target": f"m:{method}"}, {"alt": "sse"})

    def _content(self, role: str, *what: Any) -> dict[str, Any]:
        if role == "user":
            return {"role": role, "parts": [{"text": what[0]}]}
        if role == "tool":
            result = {"name": what[0].name, "id": what[0].id, "response": {"output": what[1]}}
            return {"role": "user", "parts": [{"functionResponse": result}]}
        return {"role": "model", "parts": [self._wire(part) for part in what[0]]}

    def _wire(self, part: Part) -> dict[str, Any]:
        if isinstance(part, Thought):
            return {"text": part.text, "thought": True}
        if isinstance(part, str):
            return {"text": part}
        call = {"id": part.id, "name": part.name, "args": json.loads(part.arguments)}
        return {"functionCall": call}

    def said(self, raw: bytes) -> list[Part]:
        return self._parts(json.loads(raw))

    def streamed(self, raw: bytes) -> list[Part]:
        return joined([part for event in events(raw) for part in self._parts(event)])

    def _parts(self, response: dict[str, Any]) -> list[Part]:
        parts: list[Part] = []
        for part in response["candidates"][-1]["content"]["parts"]:
            if call := part.get("functionCall"):
                parts.append(ToolCall(call["id"], call["name"], json.dumps(call["args"])))
            else:
                parts.append(Thought(part["text"]) if part.get("thought") else part["text"])
        return joined(parts)


WIRES: list[Any] = [Chat(), Responses(), Messages(), Gemini()]
