"""The stub of a task for `benchmarks.chaos`: two model calls, and a reward that varies."""

from __future__ import annotations

from typing import Any

from openai import AsyncOpenAI


async def two_turns(data: dict[str, Any]) -> float:
    messages: list[Any] = [{"role": "user", "content": data["question"]}]
    async with AsyncOpenAI(max_retries=0) as client:
        for _ in range(2):
            answer = await client.chat.completions.create(model="policy", messages=messages)
            messages += [
                {"role": "assistant", "content": answer.choices[0].message.content or ""},
                {"role": "user", "content": "And then?"},
            ]
    return float(len(messages[-2]["content"]) % 2)
