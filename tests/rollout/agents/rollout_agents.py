"""Agents for the tests of pool, supervisor and inline runner."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import time
from typing import Any


async def reward(data: dict[str, Any], **extra_kwargs: Any) -> Any:
    return data["reward"]


def sync_reward(data: dict[str, Any]) -> Any:
    return data["reward"]


async def takes_nothing(data: dict[str, Any]) -> float:
    return 1.0


async def takes_the_url(data: dict[str, Any], base_url: str) -> Any:
    return {base_url: 1.0}


class Scaled:
    made = 0

    def __init__(self, scale: float = 1.0) -> None:
        type(self).made += 1
        self.scale = scale

    async def run(self, data: dict[str, Any], **extra_kwargs: Any) -> float:
        return self.scale * float(data["reward"])


async def raises(data: dict[str, Any], **extra_kwargs: Any) -> float:
    raise ValueError("the agent's own")


async def exits(data: dict[str, Any], **extra_kwargs: Any) -> float:
    sys.exit(4)


async def cancels_itself(data: dict[str, Any], **extra_kwargs: Any) -> float:
    raise asyncio.CancelledError


async def hangs(data: dict[str, Any], **extra_kwargs: Any) -> float:
    await asyncio.Event().wait()
    return 1.0


async def hangs_on(data: dict[str, Any], **extra_kwargs: Any) -> float:
    """Ignores being cancelled until `data["released"]` is there."""
    while "released" not in data:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0.01)
    return 1.0


async def chats(data: dict[str, Any], **extra_kwargs: Any) -> float:
    from openai import AsyncOpenAI

    async with AsyncOpenAI(max_retries=0, **extra_kwargs) as client:
        answer = await client.chat.completions.create(
            model="any", messages=[{"role": "user", "content": "hello"}]
        )
    return float(answer.choices[0].message.content or 0)


def behaves(data: dict[str, Any]) -> Any:
    """`data["as"]`: one of the ways to end."""
    match data["as"]:
        case "exception":
            raise ValueError("the agent's own")
        case "exited":
            os._exit(7)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "timeout":
            time.sleep(60)
        case "output_limit":
            while True:
                print("x" * 10_000)
        case "result_limit":
            return "x" * 2**21
        case "invalid_result":
            return float("nan")
        case "environ":
            return dict(os.environ)
    return 0.5


def leaves_daemon(data: dict[str, Any]) -> float:
    """Leaves a process called `data["name"]` behind, in a session of its own."""
    ready, tell = os.pipe()
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.fork() == 0:
            pr_set_name = 15
            ctypes.CDLL(None).prctl(pr_set_name, data["name"].encode(), 0, 0, 0)
            os.write(tell, b"!")
            time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    if data.get("kill_above"):
        for pid in {1, os.getppid()} - {0}:
            for number in (signal.SIGSTOP, signal.SIGKILL):
                with contextlib.suppress(PermissionError, ProcessLookupError):
                    os.kill(pid, number)
    if data.get("hang"):
        time.sleep(60)
    return 1.0


def asks_the_web(data: dict[str, Any]) -> Any:
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(data["url"], timeout=20)
    except urllib.error.HTTPError as error:
        raise RuntimeError(error.reason) from None


async def sleeps(data: dict[str, Any], **extra_kwargs: Any) -> float:
    await asyncio.sleep(data["seconds"])
    return 1.0


def answers_in_a_file(data: dict[str, Any]) -> float:
    with open("question") as question, open("answer", "w") as answer:
        left, right = question.read().split(" * ")
        answer.write(str(int(left) * int(right)))
    os.remove("question")
    os.symlink("answer", "link")
    return 1.0
