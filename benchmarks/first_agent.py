"""The agent of the spawn benchmark on the OpenAI Agents SDK: one run of one model call.

Imported where `openai-agents` is installed only. As a program (`python -m benchmarks.first_agent`)
it makes the call and exits.
"""

from __future__ import annotations

import asyncio
from typing import Any

from agents import Agent, OpenAIChatCompletionsModel, RunConfig, Runner
from openai import AsyncOpenAI


async def call(data: dict[str, Any]) -> float:
    async with AsyncOpenAI(max_retries=0) as client:
        agent = Agent(name="first", model=OpenAIChatCompletionsModel("default", client))
        config = RunConfig(tracing_disabled=True)
        result = await Runner.run(agent, "What is 2 + 2?", run_config=config)
    return float(result.final_output == "4")


if __name__ == "__main__":
    asyncio.run(call({}))
