"""Ready agents for questions with one short answer, on the OpenHands SDK (`openhands-sdk`).

A task is `{"messages": [...], "answer": "..."}`, of the system's and the user's messages; the
system's are used in place of OpenHands' own long prompt. Constructor arguments are those of the
SDK's `LLM` (`temperature`, `max_output_tokens`, ...), except those that an agent names as its own.
Returned is the reward, 0 or 1. The SDK needs Python 3.12 and takes long to import: so it is
imported at once, by the zygote, and not by each child.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openhands.sdk import LLM, Agent, Conversation, ConversationExecutionStatus
from openhands.sdk.conversation.response_utils import get_agent_final_response
from openhands.sdk.tool import (
    Action,
    Observation,
    Tool,
    ToolDefinition,
    ToolExecutor,
    register_tool,
)
from pydantic import Field

from areal_sub.workflow.arithmetic import calculate
from areal_sub.workflow.grading import grade_math
from areal_sub.workflow.openai.math_agent import CALCULATOR_TOOL
from areal_sub.workflow.opening import opening

SYSTEM_PROMPT = "You are a helpful assistant. Answer the user's question."


class MathAgent:
    """OpenHands' agent without tools: one model call, and its answer is graded."""

    def __init__(self, *, model: str = "openai/default", **settings: Any) -> None:
        self._llm = {"model": model, **settings}
        self._tools: list[Any] = []
        self._max_turns = 1

    async def run(self, data: dict[str, Any], **extra_kwargs: Any) -> float:
        system, question = opening(data["messages"])
        agent = Agent(
            llm=_llm(self._llm, extra_kwargs),
            tools=self._tools,
            include_default_tools=[],
            system_prompt=system or SYSTEM_PROMPT,
        )
        conversation = Conversation(
            agent=agent,
            workspace=str(Path.cwd()),
            max_iteration_per_run=self._max_turns,
            visualizer=None,
        )
        try:
            conversation.send_message(question)
            await conversation.arun()
            # Else the calls are used up, or it is stuck.
            if conversation.state.execution_status is not ConversationExecutionStatus.FINISHED:
                return 0.0
            answer = get_agent_final_response(conversation.state.events)
        finally:
            conversation.close()
        return grade_math(answer, data["answer"])


class MathToolAgent(MathAgent):
    """May use a calculator for up to `max_turns` model calls.

    0 as well where the calls are used up before there is an answer.
    """

    def __init__(
        self, *, max_turns: int = 4, model: str = "openai/default", **settings: Any
    ) -> None:
        super().__init__(model=model, **settings)
        self._max_turns = max_turns
        self._tools = [Tool(name=CalcTool.name)]


class CalcAction(Action):
    expression: str = Field(description="The expression.")


class CalcObservation(Observation):
    """Its text is the value."""


class CalcExecutor(ToolExecutor[CalcAction, CalcObservation]):
    def __call__(self, action: CalcAction, conversation: Any = None) -> CalcObservation:
        try:
            return CalcObservation.from_text(calculate(action.expression))
        except ValueError as error:
            return CalcObservation.from_text(f"error: {error}", is_error=True)


class CalcTool(ToolDefinition[CalcAction, CalcObservation]):
    """The calculator of the other ready agents."""

    name = CALCULATOR_TOOL["function"]["name"]

    @classmethod
    def create(cls, conv_state: Any = None, **params: Any) -> Sequence[CalcTool]:
        return [
            cls(
                description=CALCULATOR_TOOL["function"]["description"],
                action_type=CalcAction,
                observation_type=CalcObservation,
                executor=CalcExecutor(),
            )
        ]


register_tool(CalcTool.name, CalcTool)


def _llm(settings: dict[str, Any], extra_kwargs: dict[str, Any]) -> LLM:
    """From what the trainer passes inline; in `subproc` mode it passes nothing, and LiteLLM, which
    OpenHands calls models with, reads `OPENAI_BASE_URL` and `OPENAI_API_KEY` by itself. It has its
    own HTTP client: the trainer's cannot be given to it."""
    given = {
        key: extra_kwargs[key]
        for key in ("base_url", "api_key")
        if extra_kwargs.get(key) is not None
    }
    # No retries: a retried call would leave a sibling turn that nothing continues.
    return LLM(usage_id="agent", num_retries=0, **settings, **given)
