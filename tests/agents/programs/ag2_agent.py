"""AG2, on Chat Completions, streamed; with a calculator."""

from ag2 import Agent, tool
from ag2.config import OpenAIConfig
from calculator import calc

from areal_sub.workflow.grading import grade_math


async def agent(data):
    config = OpenAIConfig(model="default", streaming=True)
    solver = Agent("solver", config=config, tools=[tool(calc)])
    reply = await solver.ask(data["messages"][-1]["content"])
    return grade_math(reply.body or "", data["answer"])
