"""CrewAI, a crew of one with a calculator for up to four calls."""

from calculator import calc
from crewai import Agent, Crew, Task
from crewai.tools import tool

from areal_sub.workflow.grading import grade_math


def agent(data):
    tools = [tool("calc")(calc)]
    solver = Agent(
        role="Calculator", goal="Answer the question", backstory="", tools=tools, max_iter=4
    )
    question = data["messages"][-1]["content"]
    task = Task(description=question, expected_output="A number", agent=solver)
    return grade_math(Crew(agents=[solver], tasks=[task]).kickoff().raw, data["answer"])
