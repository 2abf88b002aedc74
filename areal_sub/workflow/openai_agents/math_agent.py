"""Ready agents for questions with one short answer, on the OpenAI Agents SDK (`openai-agents`).

A task is `{"messages": [...], "answer": "..."}`; constructor arguments are `ModelSettings`, except
those that an agent names as its own. Returned is the reward, 0 or 1. The SDK calls the Responses
API. It takes seconds to import: so it is imported at once, by the zygote, and not by each child.
"""

from __future__ import annotations

from typing import Any

from agents import Agent, FunctionTool, ModelSettings, OpenAIProvider, RunConfig, Runner
from agents.exceptions import MaxTurnsExceeded, ModelBehaviorError

from areal_sub.workflow.grading import grade_math
from areal_sub.workflow.openai.client import openai_client
from areal_sub.workflow.openai.math_agent import CALCULATOR_TOOL, use_calculator


class MathAgent:
    """One model call; its answer is graded."""

    def __init__(self, *, model: str = "default", **settings: Any) -> None:
        self._agent = Agent(
            name="math", model=model, model_settings=ModelSettings(**settings), tools=self._tools()
        )
        self._max_turns = 1

    def _tools(self) -> list[Any]:
        return []

    async def run(self, data: dict[str, Any], **extra_kwargs: Any) -> float:
        async with openai_client(extra_kwargs) as client:
            config = RunConfig(
                model_provider=OpenAIProvider(openai_client=client), tracing_disabled=True
            )
            try:
                result = await Runner.run(
                    self._agent, data["messages"], max_turns=self._max_turns, run_config=config
                )
            # Out of turns, or a call to a tool that there is not: the policy's own mistakes.
            except (MaxTurnsExceeded, ModelBehaviorError):
                return 0.0
        return grade_math(str(result.final_output), data["answer"])


class MathToolAgent(MathAgent):
    """May use a calculator for up to `max_turns` model calls.

    0 as well where the calls are used up before there is an answer.
    """

    def __init__(self, *, max_turns: int = 4, model: str = "default", **settings: Any) -> None:
        super().__init__(model=model, **settings)
        self._max_turns = max_turns

    def _tools(self) -> list[Any]:
        function = CALCULATOR_TOOL["function"]

        async def use(_: Any, arguments: str) -> str:
            return use_calculator(function["name"], arguments)

        return [
            FunctionTool(
                name=function["name"],
                description=function["description"],
                params_json_schema=function["parameters"],
                on_invoke_tool=use,
                strict_json_schema=False,
            )
        ]
