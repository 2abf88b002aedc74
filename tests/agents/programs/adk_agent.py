"""Google's Agent Development Kit on Gemini: streamed, with a calculator for up to four calls."""

from calculator import calc
from google.adk.agents import Agent
from google.adk.agents.invocation_context import LlmCallsLimitExceededError
from google.adk.agents.run_config import RunConfig, StreamingMode
from google.adk.runners import InMemoryRunner
from google.genai import types

from areal_sub.workflow.grading import grade_math


async def agent(data):
    solver = Agent(name="solver", model="gemini-2.5-flash", tools=[calc])
    runner = InMemoryRunner(agent=solver, app_name="calculator")
    session = await runner.session_service.create_session(app_name="calculator", user_id="user")
    question = types.Content(role="user", parts=[types.Part(text=data["messages"][-1]["content"])])
    events = runner.run_async(
        user_id=session.user_id,
        session_id=session.id,
        new_message=question,
        run_config=RunConfig(streaming_mode=StreamingMode.SSE, max_llm_calls=4),
    )
    answer = ""
    try:
        async for event in events:
            if event.is_final_response() and event.content:
                answer = "".join(part.text or "" for part in event.content.parts or ())
    except (LlmCallsLimitExceededError, ValueError):  # the policy's own mistakes
        return 0.0
    return grade_math(answer, data["answer"])
