"""Pydantic AI, by its default: OpenAI's Responses; with a calculator for up to four calls."""

from calculator import calc
from pydantic_ai import Agent, UsageLimitExceeded
from pydantic_ai.exceptions import UnexpectedModelBehavior
from pydantic_ai.usage import UsageLimits

from areal_sub.workflow.grading import grade_math


async def agent(data):
    solver = Agent("openai:default", tools=[calc])
    question = data["messages"][-1]["content"]
    try:
        result = await solver.run(question, usage_limits=UsageLimits(request_limit=4))
    except (UsageLimitExceeded, UnexpectedModelBehavior):  # the policy's own mistakes
        return 0.0
    return grade_math(result.output, data["answer"])
