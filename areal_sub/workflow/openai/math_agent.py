"""Ready agents for questions with one short answer, on the OpenAI SDK alone.

A task is `{"messages": [...], "answer": "..."}`. Constructor arguments are passed to
`chat.completions.create` as they are (`temperature`, `max_completion_tokens`, ...), except those
that an agent names as its own. The agents know nothing of training: they call "OpenAI" and return
a reward. Importing this module does not import the SDK.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

from areal_sub.workflow.arithmetic import calculate
from areal_sub.workflow.grading import grade_math
from areal_sub.workflow.openai.client import openai_client

if TYPE_CHECKING:
    from openai.types.chat.chat_completion import Choice

CALCULATOR_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calc",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}


class MathAgent:
    """One model call; its answer is graded. Returns the reward, 0 or 1; a cut-off answer is 0."""

    def __init__(self, *, model: str = "default", **kwargs: Any) -> None:
        self._sampling = {"model": model, **kwargs}

    async def run(self, data: dict[str, Any], **extra_kwargs: Any) -> float:
        async with openai_client(extra_kwargs) as client:
            completion = await client.chat.completions.create(
                messages=data["messages"], **self._sampling
            )
        return _grade(completion.choices[0], data["answer"])


class MultiTurnMathAgent:
    """Asks again, up to `max_turns` times, until the answer is right.

    Returns one reward per turn, keyed by completion id: 1 for the right answer, 0 for the others.
    With `rollout.openai.turn_discount` below 1 an early right answer is worth more to the turns
    before it than a late one.
    """

    def __init__(self, *, max_turns: int = 3, model: str = "default", **kwargs: Any) -> None:
        self._max_turns = max_turns
        self._sampling = {"model": model, **kwargs}

    async def run(self, data: dict[str, Any], **extra_kwargs: Any) -> dict[str, float]:
        messages = list(data["messages"])
        rewards: dict[str, float] = {}
        async with openai_client(extra_kwargs) as client:
            for _ in range(self._max_turns):
                completion = await client.chat.completions.create(
                    messages=messages, **self._sampling
                )
                choice = completion.choices[0]
                reward = _grade(choice, data["answer"])
                rewards[completion.id] = reward
                if reward == 1.0:
                    break
                messages += [
                    {"role": "assistant", "content": choice.message.content or ""},
                    {
                        "role": "user",
                        "content": "That is not right. Check it step by step and answer again.",
                    },
                ]
        return rewards


class MathToolAgent:
    """May use a calculator for up to `max_turns` model calls; the final answer is graded.

    The reward is 0 or 1; 0 as well where the calls are used up before there is an answer.
    """

    def __init__(self, *, max_turns: int = 4, model: str = "default", **kwargs: Any) -> None:
        self._max_turns = max_turns
        self._sampling = {"model": model, **kwargs}

    async def run(self, data: dict[str, Any], **extra_kwargs: Any) -> float:
        messages = list(data["messages"])
        async with openai_client(extra_kwargs) as client:
            for _ in range(self._max_turns):
                completion = await client.chat.completions.create(
                    messages=messages, tools=cast(Any, [CALCULATOR_TOOL]), **self._sampling
                )
                choice = completion.choices[0]
                message = choice.message
                if not message.tool_calls:
                    return _grade(choice, data["answer"])
                messages.append(message.model_dump(exclude_none=True))
                for call in message.tool_calls:
                    if call.type != "function":  # only functions were offered
                        return 0.0
                    content = use_calculator(call.function.name, call.function.arguments)
                    messages.append({"role": "tool", "tool_call_id": call.id, "content": content})
        return 0.0


def _grade(choice: Choice, answer: str) -> float:
    """1 for the right answer; 0 for a wrong one, and for one that was cut off at the token limit.

    A cut-off text is no answer: it would train the policy never to end its turn.
    """
    if choice.finish_reason == "length":
        return 0.0
    return grade_math(choice.message.content or "", answer)


def use_calculator(name: str, arguments: str) -> str:
    """What the tool says to one call of the model: the value, or `error: ...` to learn from."""
    known = CALCULATOR_TOOL["function"]["name"]
    if name != known:
        return f"error: there is no tool {name!r}, only {known!r}"
    try:
        parsed = json.loads(arguments)
        expression = parsed["expression"]
        if not isinstance(expression, str):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        return 'error: the arguments must be {"expression": "..."}'
    try:
        return calculate(expression)
    except ValueError as error:
        return f"error: {error}"
