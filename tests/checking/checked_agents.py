"""Agents that are checked; each shows one thing."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import urllib.parse
import urllib.request
from typing import Any

from openai import AsyncOpenAI, BadRequestError, OpenAI

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {
            "type": "object",
            "properties": {"where": {"type": "string"}},
            "required": ["where"],
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer"}, "why": {"enum": ["luck", "skill"]}},
    "required": ["answer", "why"],
    "additionalProperties": False,
}
FOUND_AT_IMPORT = os.environ.get("HF_HUB_OFFLINE")


async def edits_history(data: dict[str, Any]) -> float:
    """Streams with a tool, trims the answer it sends back, asks for a title on another model."""
    async with AsyncOpenAI() as client:
        messages: list[Any] = [{"role": "user", "content": data["question"]}]
        stream = await client.chat.completions.create(
            model="big", messages=messages, tools=[TOOL], stream=True
        )
        async for _ in stream:
            pass
        messages += [{"role": "assistant", "content": "edited"}, {"role": "user", "content": "Go"}]
        await client.chat.completions.create(model="big", messages=messages, tools=[TOOL])
        await client.responses.create(model="small", input="A title, please")
    return 1.0


def wants_more(data: dict[str, Any]) -> float:
    """Structured output, and a web page."""
    os.write(2, f"HF_HUB_OFFLINE={FOUND_AT_IMPORT}".encode())
    client = OpenAI(max_retries=0)
    completion = client.chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "?"}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": SCHEMA, "strict": True},
        },
    )
    print(completion.choices[0].message.content)
    try:
        urllib.request.urlopen("https://api.example.com/v1", timeout=5)
    except OSError:
        return 0.5
    return 1.0


def never_calls(data: dict[str, Any]) -> None:
    os.write(2, b"\x1b[2Jnothing to ask\n")


ADDRESS_AT_IMPORT = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1")


def asks_elsewhere(data: dict[str, Any]) -> float:
    client = OpenAI(base_url=ADDRESS_AT_IMPORT, max_retries=0)
    client.chat.completions.create(model="m", messages=[{"role": "user", "content": "?"}])
    return 1.0


def doubles_its_base(data: dict[str, Any]) -> float:
    client = OpenAI(base_url=f"{os.environ['OPENAI_BASE_URL']}/v1", max_retries=0)
    client.chat.completions.create(model="m", messages=[{"role": "user", "content": "?"}])
    return 1.0


def takes_nothing() -> float:
    return 1.0


def makes_do_without(data: dict[str, Any]) -> float:
    """Wants what the policy cannot give, and goes on without an answer."""
    client = OpenAI(max_retries=0)
    with contextlib.suppress(BadRequestError):
        client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "?"}],
            logprobs=True,
            top_logprobs=5,
        )
    return 0.0


def ignores_no_proxy(data: dict[str, Any]) -> float:
    """Asks for the model through the proxy of the environment, if there is one."""
    base = urllib.parse.urlsplit(os.environ["OPENAI_BASE_URL"])
    proxy = os.environ.get("HTTPS_PROXY")
    connection = http.client.HTTPConnection(
        urllib.parse.urlsplit(proxy).netloc if proxy else base.netloc
    )
    if proxy:
        connection.set_tunnel(str(base.hostname), base.port)
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "?"}]})
    connection.request("POST", f"{base.path}/chat/completions", body)
    return float(connection.getresponse().status == 200)


def wants_a_format(data: dict[str, Any]) -> float:
    """What the model is to say, it says in words."""
    answer = OpenAI().chat.completions.create(
        model="m", messages=[{"role": "user", "content": 'Say {"answer": 56}, and nothing else.'}]
    )
    return float(json.loads(answer.choices[0].message.content or "")["answer"])
