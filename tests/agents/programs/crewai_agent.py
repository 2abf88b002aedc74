"""CrewAI, a crew of one with a calculator for up to four calls."""

from crewai import Agent, Crew, Task
from crewai.tools import tool

from areal_sub.workflow.arithmetic import calculate
from areal_sub.workflow.grading import grade_math


@tool("calc")
def calc(expression: str) -> str:
    """Evaluate an arithmetic expression."""
    try:
        return calculate(expression)
    except ValueError as error:
        return f"error: {error}"


def agent(data):
    solver = Agent(
        role="Calculator", goal="Answer the question", backstory="", tools=[calc], max_iter=4
    )
    question = data["messages"][-1]["content"]
    task = Task(description=question, expected_output="A number", agent=solver)
    return grade_math(Crew(agents=[solver], tasks=[task]).kickoff().raw, data["answer"])
