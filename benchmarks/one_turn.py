"""The agent of the rollout benchmark: one model call with the real OpenAI SDK, reward 1.

Run by all ways in `ways.py`; as a program (`python -m benchmarks.one_turn`) it takes its model's
address from the environment and prints the reward.
"""

from __future__ import annotations

import asyncio
from typing import Any

from openai import AsyncOpenAI


class OneTurn:
    """`shared_client=False`: ignore the client that the trainer offers, and make one's own."""

    def __init__(self, *, shared_client: bool = True) -> None:
        self._shared_client = shared_client

    async def run(self, data: dict[str, Any], **extra_kwargs: Any) -> float:
        if not self._shared_client:
            extra_kwargs.pop("http_client", None)
        async with AsyncOpenAI(max_retries=0, **extra_kwargs) as client:
            completion = await client.chat.completions.create(
                model="default", messages=data["messages"]
            )
        return float(completion.choices[0].message.content == "4")


TASK: dict[str, Any] = {"messages": [{"role": "user", "content": "What is 2 + 2?"}]}

if __name__ == "__main__":
    print(asyncio.run(OneTurn().run(TASK)))
