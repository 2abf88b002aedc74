"""LiteLLM, as an Anthropic client, streamed: Messages, with a calculator for up to four calls."""

import litellm

from areal_sub.workflow.grading import grade_math
from areal_sub.workflow.openai.math_agent import CALCULATOR_TOOL, use_calculator


async def agent(data):
    messages = list(data["messages"])
    for _ in range(4):
        stream = await litellm.acompletion(
            model="anthropic/default",
            messages=messages,
            tools=[CALCULATOR_TOOL],
            max_tokens=48,
            stream=True,
            num_retries=0,
        )
        chunks = [chunk async for chunk in stream]
        message = litellm.stream_chunk_builder(chunks, messages=messages).choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            return grade_math(message.content or "", data["answer"])
        for call in message.tool_calls:
            content = use_calculator(call.function.name, call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": content})
    return 0.0
