"""Pydantic AI, by its default: OpenAI's Responses; with a calculator for up to four calls."""

from pydantic_ai import Agent, UsageLimitExceeded
from pydantic_ai.exceptions import UnexpectedModelBehavior
from pydantic_ai.usage import UsageLimits

from areal_sub.workflow.arithmetic import calculate
from areal_sub.workflow.grading import grade_math


def calc(expression: str) -> str:
    """Evaluate an arithmetic expression."""
    try:
        return calculate(expression)
    except ValueError as error:
        return f"error: {error}"


async def agent(data):
    solver = Agent("openai:default", tools=[calc])
    question = data["messages"][-1]["content"]
    try:
        result = await solver.run(question, usage_limits=UsageLimits(request_limit=4))
    except (UsageLimitExceeded, UnexpectedModelBehavior):  # the policy's own mistakes
        return 0.0
    return grade_math(result.output, data["answer"])
