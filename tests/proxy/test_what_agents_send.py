"""Odd things that real agents send, dialect by dialect: answered, or refused in words.

One table for what is otherwise spread over SDKs and agents; details have tests of their own beside.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

U = [{"role": "user", "content": "?"}]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
GEMINI = "/v1beta/models/gemini-2.5-pro:generateContent"
G = [{"parts": [{"text": "?"}]}]
USE = {"type": "tool_use", "id": "c", "name": "f", "input": {}}


def result(**fields: Any) -> list[dict[str, Any]]:
    block = {"type": "tool_result", "tool_use_id": "c", **fields}
    return [*U, {"role": "assistant", "content": [USE]}, {"role": "user", "content": [block]}]


TAKEN: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": U, "model": "gpt-5.7-nobody-has", "tools": None, "stop": None, "n": None}),
    (CHAT, {"messages": [{"role": "developer", "content": [{"type": "text", "text": "a"}]}, *U]}),
    (CHAT, {"messages": U, "seed": 7, "user": "me", "metadata": {"a": "b"}, "store": False}),
    (CHAT, {"messages": U, "max_completion_tokens": 3, "stop": ["x", "y"], "top_logprobs": 0}),
    (CHAT, {"messages": U, "reasoning_effort": "high", "verbosity": "low", "service_tier": "flex"}),
    (CHAT, {"messages": U, "stream_options": None, "parallel_tool_calls": None, "functions": []}),
    (CHAT, {"messages": U, "modalities": ["text"], "audio": None, "web_search_options": None,
            "prediction": {"type": "content", "content": "x"}, "logit_bias": {"5": -100}}),
    (CHAT, {"messages": [*U, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                         {"role": "tool", "tool_call_id": "c", "content": PICTURE["type"]}]}),
    (CHAT, {"messages": [*U, {"role": "assistant", "content": "", "audio": None, "refusal": None,
                              "function_call": None, "annotations": []}, *U]}),
    (RESPONSES, {"input": "?", "store": False, "include": ["reasoning.encrypted_content"],
                 "prompt_cache_key": "k", "previous_response_id": None, "reasoning": None,
                 "tools": [], "tool_choice": "auto", "text": None, "truncation": "disabled"}),
    (RESPONSES, {"input": [{"type": "reasoning", "id": "rs_1", "summary": [], "content": None,
                            "encrypted_content": "gAAAA-from-elsewhere"}, *U], "store": False}),
    (RESPONSES, {"input": U, "reasoning": {"effort": "high", "summary": "auto"},
                 "client_metadata": {"x": "y"}, "safety_identifier": None}),
    (RESPONSES, {"input": "?", "truncation": "auto"}),  # agency-swarm, always
    (MESSAGES + "?beta=true", {"messages": U, "max_tokens": 4, "betas": ["new-2099-01-01"]}),
    ("/messages", {"messages": [{"role": "system", "content": "s"}, *U], "max_tokens": 4}),
    (MESSAGES, {"messages": result(content=[{"type": "text", "text": "no"}], is_error=True),
                "max_tokens": 4}),
    (MESSAGES, {"messages": result(), "max_tokens": 4}),
    (MESSAGES, {"messages": [*U, {"role": "assistant", "content": [
        {"type": "redacted_thinking", "data": "x"}, {"type": "thinking", "thinking": "hm",
         "signature": "elsewhere's"}, {"type": "text", "text": "a"}]}, *U], "max_tokens": 4}),
    (MESSAGES, {"messages": U, "max_tokens": 4, "thinking": {"type": "adaptive"}, "top_k": 5,
                "stop_sequences": ["x"], "metadata": {"user_id": "u"}, "tool_choice": None,
                "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
                "context_management": {"edits": []}, "output_config": {"effort": "low"}}),
    (GEMINI, {"contents": G, "systemInstruction": {"parts": [{"text": "s"}], "role": "user"}}),
    (GEMINI, {"contents": G, "system_instruction": {"parts": [{"text": "s"}]},
              "safety_settings": [], "generation_config": {"top_k": 40.0, "seed": 1,
              "thinking_config": {"thinking_budget": 0}, "max_output_tokens": 4}}),
    (GEMINI.replace("v1beta", "v1"), {"contents": G, "generationConfig": {"temperature": 2}}),
    (GEMINI, {"contents": [*G, {"role": "model", "parts": [{"functionCall": {"name": "f"}}]},
              {"role": "user", "parts": [{"functionResponse": {"name": "f", "response": {}}}]}]}),
    (GEMINI.replace(":generate", ":stream").replace("Content", "GenerateContent") + "?alt=sse",
     {"contents": G}),
    (GEMINI.replace("generateContent", "countTokens"), {"contents": G}),
    (MESSAGES + "/count_tokens?beta=true", {"messages": U, "model": "claude-x"}),
]  # fmt: skip

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {"messages": [{"role": "user", "content": [PICTURE]}]}, "reads text, not 'image_url'"),
    (CHAT, {"messages": U, "functions": [{"name": "f"}]}, "functions is deprecated; use tools"),
    (CHAT, {"messages": [*U, {"role": "assistant", "function_call": {"name": "f"}}]}, "deprecated"),
    (CHAT, {"messages": U, "logprobs": True, "top_logprobs": 5}, "top_logprobs"),
    (CHAT, {"messages": U, "tools": [{"type": "web_search"}]}, "must be 'function'"),
    (CHAT, {"messages": U, "max_completion_tokens": 0}, "max_completion_tokens"),
    (CHAT, {"messages": U, "modalities": ["text", "audio"]}, "answers with text only"),
    (CHAT, {"messages": U, "audio": {"voice": "alloy", "format": "wav"}}, "answers with text only"),
    (CHAT, {"messages": U, "web_search_options": {}}, "searches the web"),
    (RESPONSES, {"input": "?", "tools": [{"type": "web_search_preview"}]}, "web_search_preview"),
    (RESPONSES, {"input": "?", "tools": [{"type": "shell"}]}, "only OpenAI's models know"),
    (RESPONSES, {"input": "?", "background": True}, "background"),
    (RESPONSES, {"input": "?", "previous_response_id": "resp_none"}, "not found"),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "reads text"),
    (MESSAGES, {"messages": U, "max_tokens": 4, "thread": {"type": "create"}}, "thread"),
    (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "reads text"),
    (MESSAGES, {"messages": result(content=[{"type": "image"}])}, "reads text"),
    (MESSAGES, {"messages": [*U, {"role": "assistant", "content": "{"}]}, "prefilled"),
    (MESSAGES, {"messages": U, "tools": [{"type": "web_search_20250305"}]}, "web_search_20250305"),
    (GEMINI, {"contents": G, "tools": [{"googleSearch": {}}]}, "googleSearch"),
    (GEMINI, {"contents": G, "tools": [{"code_execution": {}}]}, "codeExecution"),
    (GEMINI, {"contents": [{"parts": [{"inlineData": {}}]}]}, "inlineData"),
    (GEMINI, {"contents": G, "cachedContent": "cachedContents/x"}, "cachedContent"),
    ("/v1/embeddings", {"input": "x", "model": "text-embedding-3-small"}, "no embeddings"),
    (GEMINI.replace("generateContent", "embedContent"), {"content": G[0]}, "no embeddings"),
]


async def ask(
    proxy: Any, method: str, path: str, body: dict[str, Any] | None, **headers: str
) -> tuple[int, bytes, bytes]:
    """(status, head, body)."""
    raw = json.dumps(body).encode() if body is not None else b""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    lines = [f"{method} {path} HTTP/1.1", "host: h", "connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    writer.write("\r\n".join([*lines, f"content-length: {len(raw)}"]).encode() + b"\r\n\r\n" + raw)
    head, _, answer = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return int(head.split()[1]), head, answer


def test_what_is_taken(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says("Hi<|im_end|>")
        rollout = await proxy.open(max_turns=10**6)
        for path, body in TAKEN:
            status, _, answer = await ask(proxy, "POST", path, body, x_api_key=rollout.key)
            assert status == 200, (path, body, answer)
            if model := body.get("model"):
                assert model.encode() in answer or b"tokens" in answer

    proxied(work)


def test_an_answer_has_what_strict_clients_require(proxied: Any) -> None:
    """OpenRouter's SDK for Python validates each field of an answer."""

    async def work(proxy: Any) -> None:
        proxy.engine.says("Hi<|im_end|>")
        rollout = await proxy.open()
        _, _, answer = await ask(proxy, "POST", CHAT, {"messages": U}, x_api_key=rollout.key)
        assert json.loads(answer)["system_fingerprint"] is None

    proxied(work)


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused(proxied: Any, stream: bool) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        for path, body, words in REFUSED:
            asked = {**body, "stream": True} if stream else body
            status, head, answer = await ask(proxy, "POST", path, asked, x_api_key=rollout.key)
            assert status == 400, (path, body, answer)
            assert words in json.loads(answer)["error"]["message"], answer
            assert b"x-should-retry: false" in head
        assert proxy.engine.requests == []

    proxied(work)


LONG = "word " * 5000


@pytest.mark.parametrize(
    ("path", "body", "sign"),
    [
        (CHAT, {"messages": [{"role": "user", "content": LONG}]}, '"context_length_exceeded"'),
        (RESPONSES, {"input": LONG}, '"context_length_exceeded"'),
        (RESPONSES, {"input": LONG, "truncation": "auto"}, '"context_length_exceeded"'),
        ("/v1/completions", {"prompt": LONG}, '"context_length_exceeded"'),
        (MESSAGES, {"messages": [{"role": "user", "content": LONG}], "max_tokens": 4},
         "prompt is too long"),
        (GEMINI, {"contents": [{"parts": [{"text": LONG}]}]}, "exceeds the maximum number of"),
    ],
)  # fmt: skip
def test_too_long_is_said_as_the_dialect_says_it(
    proxied: Any, path: str, body: dict[str, Any], sign: str
) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        status, _, answer = await ask(proxy, "POST", path, body, x_api_key=rollout.key)
        assert (status, sign in answer.decode()) == (400, True), answer

    proxied(work, max_model_len=128)


def test_the_key_may_be_anywhere(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says("Hi<|im_end|>")
        rollout = await proxy.open()
        key = rollout.key
        places: list[tuple[str, dict[str, str]]] = [
            ("", {"authorization": f"Bearer {key}"}),
            ("", {"authorization": f"bearer {key}"}),
            ("", {"x_api_key": key}),
            ("", {"x_goog_api_key": key}),
            ("", {"authorization": f"Bearer {key}", "x_api_key": key}),
            ("", {"authorization": "Bearer sk-dummy", "x_api_key": key}),
        ]
        for path, body in [(CHAT, {"messages": U}), (RESPONSES, {"input": "?"}),
                           (MESSAGES, {"messages": U}), (GEMINI, {"contents": G})]:  # fmt: skip
            for query, headers in places:
                assert (await ask(proxy, "POST", path + query, body, **headers))[0] == 200
            assert (await ask(proxy, "POST", f"/k/{key}{path}", body))[0] == 200
            assert (await ask(proxy, "POST", f"{path}?key={key}", body))[0] == 200
            assert (await ask(proxy, "POST", path, body))[0] == 401

    proxied(work)


def test_probes(proxied: Any) -> None:
    """Whether somebody is there, without a key; and WebSockets, which nobody speaks."""

    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        for path in ("/", "/v1", "/v1beta", CHAT, MESSAGES, RESPONSES):
            assert (await ask(proxy, "HEAD", path, None))[0] == 200, path
        upgrade = {"upgrade": "websocket", "x_api_key": rollout.key}
        assert (await ask(proxy, "GET", RESPONSES, None, **upgrade))[0] == 426
        status, _, answer = await ask(proxy, "GET", "/v1/models", None, x_api_key=rollout.key)
        assert (status, json.loads(answer)["data"][0]["id"]) == (200, "policy")

    proxied(work)
