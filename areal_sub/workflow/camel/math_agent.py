"""Ready agents for questions with one short answer, on CAMEL-AI (`camel-ai`).

A task is `{"messages": [...], "answer": "..."}`, of the system's and the user's messages.
Constructor arguments go to the model as they are (`temperature`, ...), except those that an agent
names as its own. Returned is the reward, 0 or 1; a cut-off answer is 0. CAMEL takes seconds to
import: so it is imported at once, by the zygote, and not by each child.
"""

from __future__ import annotations

import json
from typing import Any

from camel.agents import ChatAgent
from camel.models import OpenAICompatibleModel
from camel.toolkits import FunctionTool
from camel.utils import BaseTokenCounter

from areal_sub.workflow.grading import grade_math
from areal_sub.workflow.openai.client import openai_client
from areal_sub.workflow.openai.math_agent import CALCULATOR_TOOL, use_calculator
from areal_sub.workflow.opening import opening

CHARS_PER_TOKEN = 4


class MathAgent:
    """One model call; its answer is graded."""

    def __init__(self, *, model: str = "default", **sampling: Any) -> None:
        self._model = model
        self._sampling = sampling
        self._max_turns = 1

    def _tools(self) -> list[Any]:
        return []

    async def run(self, data: dict[str, Any], **extra_kwargs: Any) -> float:
        system, question = opening(data["messages"])
        async with openai_client(extra_kwargs) as client:
            model = OpenAICompatibleModel(
                self._model,
                model_config_dict=dict(self._sampling),
                token_counter=_Characters(),
                client=client,  # the synchronous one, which `astep` does not use
                async_client=client,
            )
            agent = ChatAgent(
                system_message=system or None,
                model=model,
                tools=self._tools(),
                max_iteration=self._max_turns,
                retry_attempts=1,
            )
            response = await agent.astep(question)
        reasons = response.info.get("termination_reasons") or []
        if not response.msgs or "length" in reasons:
            return 0.0
        return grade_math(response.msgs[0].content or "", data["answer"])


class MathToolAgent(MathAgent):
    """May use a calculator for up to `max_turns` model calls.

    0 as well where the calls are used up before there is an answer.
    """

    def __init__(self, *, max_turns: int = 4, model: str = "default", **sampling: Any) -> None:
        super().__init__(model=model, **sampling)
        self._max_turns = max_turns

    def _tools(self) -> list[Any]:
        name = CALCULATOR_TOOL["function"]["name"]

        def calc(expression: str) -> str:
            return use_calculator(name, json.dumps({"expression": expression}))

        return [FunctionTool(calc, openai_tool_schema=CALCULATOR_TOOL)]


class _Characters(BaseTokenCounter):
    """CAMEL counts tokens only to know when to forget, and would fetch the vocabulary of a model
    of OpenAI's for it, which is not the one that is trained."""

    def count_tokens_from_messages(self, messages: Any) -> int:
        return sum(len(str(each.get("content") or "")) for each in messages) // CHARS_PER_TOKEN

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: list[int]) -> str:
        return bytes(token_ids).decode("utf-8", "replace")
