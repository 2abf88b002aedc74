"""AG2, on Chat Completions, streamed; with a calculator."""

from ag2 import Agent, tool
from ag2.config import OpenAIConfig

from areal_sub.workflow.arithmetic import calculate
from areal_sub.workflow.grading import grade_math


@tool
def calc(expression: str) -> str:
    """Evaluate an arithmetic expression."""
    try:
        return calculate(expression)
    except ValueError as error:
        return f"error: {error}"


async def agent(data):
    solver = Agent("solver", config=OpenAIConfig(model="default", streaming=True), tools=[calc])
    reply = await solver.ask(data["messages"][-1]["content"])
    return grade_math(reply.body or "", data["answer"])
