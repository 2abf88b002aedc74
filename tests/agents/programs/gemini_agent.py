"""Google's Gen AI SDK, which runs the tool by itself; for up to four calls."""

from calculator import calc
from google import genai
from google.genai import types

from areal_sub.workflow.grading import grade_math


async def agent(data):
    calls = types.AutomaticFunctionCallingConfig(maximum_remote_calls=4)
    config = types.GenerateContentConfig(tools=[calc], automatic_function_calling=calls)
    async with genai.Client().aio as client:
        chat = client.chats.create(model="any", config=config)
        answer = await chat.send_message(data["messages"][-1]["content"])
    return grade_math(answer.text or "", data["answer"])
