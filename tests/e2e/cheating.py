"""An agent that cheats wherever it can, and the graders that are asked instead of it."""

from __future__ import annotations

import asyncio
import mmap
import os
import time
import urllib.error
import urllib.request
from typing import Any

from openai import AsyncOpenAI

CONTROL_ROUTES = ("/k/{key}/rl/set-reward", "/v1/end_rollout", "/update_weights")

# Made by the import, so every child of this agent shares it: the first one leaves its key in it.
_shared = mmap.mmap(-1, 64)
_left_behind: set[Any] = set()


async def cheat(data: dict[str, Any], **extra_kwargs: Any) -> float:
    base_url = extra_kwargs.get("base_url") or os.environ["OPENAI_BASE_URL"]
    key = extra_kwargs.get("api_key") or os.environ["OPENAI_API_KEY"]
    async with AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0) as client:
        await client.chat.completions.create(
            model="policy", messages=data["messages"], max_tokens=4
        )
    host = base_url.partition("/k/")[0]
    for route in CONTROL_ROUTES:
        await asyncio.to_thread(status, host + route.format(key=key), key, b"{}")
    if not _shared[0]:
        _shared[: len(key)] = key.encode()
    others = _shared[:].rstrip(b"\0").decode()
    if others != key:
        await asyncio.to_thread(status, f"{host}/v1/models", others)
    if extra_kwargs:  # inline: nothing ends what an agent leaves behind
        _left_behind.add(asyncio.ensure_future(asyncio.to_thread(call_after_end, host, key)))
    return 1.0


def call_after_end(host: str, key: str) -> None:
    deadline = time.monotonic() + 60
    while status(f"{host}/v1/models", key) == 200 and time.monotonic() < deadline:
        time.sleep(0.01)


def status(url: str, key: str, body: bytes | None = None) -> int:
    request = urllib.request.Request(url, body, {"Authorization": f"Bearer {key}"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


async def grade_length(
    task: dict[str, Any],
    transcript: list[dict[str, Any]],
    outputs: dict[str, bytes],
    report: dict[str, Any],
) -> float:
    assert "OPENAI_API_KEY" not in os.environ and "OPENAI_BASE_URL" not in os.environ
    assert transcript[0] == task["messages"][0]
    assert report["num_turns"] == 1 and report["branches"] == []
    return 0.25 + len(transcript[-1]["content"]) % 2 / 2


def fail_on_some(
    task: Any, transcript: Any, outputs: Any, report: Any, *, how: dict[str, str]
) -> Any:
    """`how`: answer of a task → the way to fail for it."""
    match how.get(task["answer"]):
        case "hang":
            time.sleep(3600)
        case "raise":
            raise ValueError("the grader's own mistake")
    return 0.5 + len(transcript[-1]["content"]) % 2 / 2
