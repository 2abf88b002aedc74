"""A conversation as an agent of each dialect sends it: whole, turn after turn. For `proxy.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.load import SYSTEM

Items = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Wire:
    path: str
    asked: Callable[[str], dict[str, Any]]  # the item that a user's text is
    body: Callable[[Items], dict[str, Any]]  # the request that a history is
    answered: Callable[[Any], Items]  # what of an answer goes into the history


WIRES = {
    "chat": Wire(
        "/v1/chat/completions",
        lambda text: {"role": "user", "content": text},
        lambda items: {"messages": [{"role": "system", "content": SYSTEM}, *items]},
        lambda answer: [answer["choices"][0]["message"]],
    ),
    "responses": Wire(
        "/v1/responses",
        lambda text: {"role": "user", "content": [{"type": "input_text", "text": text}]},
        lambda items: {"instructions": SYSTEM, "input": items, "store": False},
        lambda answer: answer["output"],
    ),
    "messages": Wire(
        "/v1/messages",
        lambda text: {"role": "user", "content": [{"type": "text", "text": text}]},
        lambda items: {"system": SYSTEM, "messages": items, "max_tokens": 4096},
        lambda answer: [{"role": "assistant", "content": answer["content"]}],
    ),
    "gemini": Wire(
        "/v1beta/models/policy:generateContent",
        lambda text: {"role": "user", "parts": [{"text": text}]},
        lambda items: {"systemInstruction": {"parts": [{"text": SYSTEM}]}, "contents": items},
        lambda answer: [answer["candidates"][0]["content"]],
    ),
}
