"""Agents for the end-to-end tests. They run in children: plain OpenAI SDK code, some of it bad."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, OpenAI

from areal_sub import AgentWorkflow


async def ask(data: dict[str, Any]) -> str:
    async with AsyncOpenAI(max_retries=0) as client:
        completion = await client.chat.completions.create(
            model="policy", messages=data["messages"], max_tokens=4
        )
    return completion.choices[0].message.content or ""


async def plain_function(data: dict[str, Any]) -> float:
    return float(len(await ask(data)) % 2)


async def another_prompt(data: dict[str, Any]) -> float:
    """As `plain_function`, but that it asks something else."""
    text = "And " + data["messages"][0]["content"]
    return float(len(await ask({"messages": [{"role": "user", "content": text}]})) % 2)


ONE_TO_NINE = {
    "type": "object",
    "properties": {"n": {"enum": list(range(1, 10))}},
    "required": ["n"],
    "additionalProperties": False,
}


async def structured(data: dict[str, Any]) -> float:
    """Fails where an answer is not what it was to be held to."""
    schema = {"name": "number", "schema": ONE_TO_NINE, "strict": True}
    tool = {"type": "function", "function": {"name": "pick", "parameters": ONE_TO_NINE}}
    common: Any = {"model": "policy", "messages": data["messages"]}
    async with AsyncOpenAI(max_retries=0) as client:
        text = await client.chat.completions.create(
            **common, response_format={"type": "json_schema", "json_schema": schema}
        )
        call = await client.chat.completions.create(
            **common, tools=[tool], tool_choice="required", parallel_tool_calls=False
        )
    first = json.loads(text.choices[0].message.content or "")["n"]
    (picked,) = call.choices[0].message.tool_calls or []
    second = json.loads(picked.function.arguments)["n"]
    assert {first, second} <= set(range(1, 10))
    return float(first > second)


def sync_function(data: dict[str, Any]) -> bool:
    with OpenAI(max_retries=0) as client:
        client.chat.completions.create(model="policy", messages=data["messages"], max_tokens=4)
    return True


async def _gate(path: str) -> None:
    """The rollout's deadline ends the wait."""
    while not Path(path).exists():  # noqa: ASYNC110, ASYNC240 (another process opens it)
        await asyncio.sleep(0.02)


class BehindAGate(AgentWorkflow):
    def __init__(self, gate: str) -> None:
        self.gate = gate

    async def run(self, data: dict[str, Any], **extra_kwargs: Any) -> float:
        async with AsyncOpenAI(max_retries=0, **extra_kwargs) as client:
            completion = await client.chat.completions.create(
                model="policy", messages=data["messages"], max_tokens=4
            )
        await _gate(self.gate)
        return float(len(completion.choices[0].message.content or "") % 2)


class Subclass(AgentWorkflow):
    """Rewards by completion id; `bonus` comes through `workflow_kwargs`."""

    def __init__(self, bonus: float) -> None:
        self.bonus = bonus

    async def run(self, data: dict[str, Any], **extra_kwargs: Any) -> dict[str, float]:
        async with AsyncOpenAI(
            base_url=extra_kwargs.get("base_url"), api_key=extra_kwargs.get("api_key")
        ) as client:
            completion = await client.chat.completions.create(
                model="policy", messages=data["messages"], max_tokens=4
            )
        return {completion.id: self.bonus}


async def misbehave(data: dict[str, Any]) -> Any:
    """Does what the task says, after one model call."""
    await ask(data)
    how = data["how"]
    if how == "raise":
        raise ValueError("the agent's own mistake")
    if how == "hang":
        time.sleep(3600)  # noqa: ASYNC251
    if how == "exit":
        os._exit(7)
    if how == "flood":
        block = "x" * 65536
        for _ in range(2**30 // len(block)):
            sys.stdout.write(block)
    if how == "words":
        return "a lot"
    if how == "nan":
        return float("nan")
    if how == "daemon":
        subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-c", f"import time; time.sleep(3600)  # {data['mark']}"],
            start_new_session=True,
        )
    return float(data["number"] % 2)


def _wait_for_steps(metrics: Path, num_steps: int) -> None:
    """The rollout's deadline ends the wait."""
    while len(metrics.read_text().splitlines()) < num_steps:
        time.sleep(0.02)


_calls: Counter[str] = Counter()  # agents that run inline share it
_first_is_back = asyncio.Event()


async def every_fate(data: dict[str, Any], **extra_kwargs: Any) -> float:
    """Inline, so that siblings know of one another, and of the run. Ends as the task says."""
    async with AsyncOpenAI(max_retries=0, **extra_kwargs) as client:
        await client.chat.completions.create(
            model="policy", messages=data["messages"], max_tokens=4
        )
    how = data.get("how", "valid")
    _calls[how] += 1
    is_first = _calls[how] % 2 == 1
    if how == "slow":  # until two steps were taken since its call
        await asyncio.to_thread(_wait_for_steps, Path(data["metrics"]), 2)
    if how == "half" and not is_first:
        raise ValueError("the agent's own mistake")
    if how == "endless" and is_first:
        _first_is_back.set()
    elif how == "endless":
        await asyncio.Event().wait()
    if how == "last":
        await _first_is_back.wait()
    return 0.5 if how == "equal" else float(is_first)
