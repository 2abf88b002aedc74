"""LlamaIndex's agent on OpenAI's Chat Completions: streamed, a calculator, up to four calls."""

from calculator import calc
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.workflow import WorkflowRuntimeError
from llama_index.llms.openai import OpenAI

from areal_sub.workflow.grading import grade_math


async def agent(data):
    # LlamaIndex wants to know the model's size, so it has to know its name.
    solver = FunctionAgent(tools=[calc], llm=OpenAI(model="gpt-4o"))
    try:
        answer = await solver.run(data["messages"][-1]["content"], max_iterations=4)
    except WorkflowRuntimeError:  # the policy's own mistakes
        return 0.0
    return grade_math(str(answer), data["answer"])
