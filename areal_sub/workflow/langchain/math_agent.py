"""Ready agents for questions with one short answer, on LangChain (`langchain`, `langchain-openai`).

A task is `{"messages": [...], "answer": "..."}`; constructor arguments go to `ChatOpenAI`, except
those that an agent names as its own. Returned is the reward, 0 or 1; a cut-off answer is 0.
LangChain takes seconds to import: so it is imported at once, by the zygote, and not by each child.
"""

from __future__ import annotations

import json
from typing import Any

from langchain.agents import create_agent
from langchain_core.tools import StructuredTool
from langchain_openai import ChatOpenAI
from langgraph.errors import GraphRecursionError

from areal_sub.workflow.grading import grade_math
from areal_sub.workflow.openai.math_agent import CALCULATOR_TOOL, use_calculator


class MathAgent:
    """One model call; its answer is graded."""

    def __init__(self, *, model: str = "default", **sampling: Any) -> None:
        self._sampling = {"model": model, **sampling}

    async def run(self, data: dict[str, Any], **extra_kwargs: Any) -> float:
        answer = await _chat_model(self._sampling, extra_kwargs).ainvoke(data["messages"])
        return _grade(answer, data["answer"])


class MathToolAgent:
    """LangChain's agent with a calculator, for up to `max_turns` model calls.

    0 as well where the calls are used up before there is an answer.
    """

    def __init__(self, *, max_turns: int = 4, model: str = "default", **sampling: Any) -> None:
        self._max_turns = max_turns
        self._sampling = {"model": model, **sampling}

    async def run(self, data: dict[str, Any], **extra_kwargs: Any) -> float:
        agent = create_agent(_chat_model(self._sampling, extra_kwargs), [_calculator()])
        # Model and tools are steps of the graph in turn, and the last step is the model's.
        steps = {"recursion_limit": 2 * self._max_turns}
        try:
            state = await agent.ainvoke({"messages": data["messages"]}, steps)
        except GraphRecursionError:
            return 0.0
        return _grade(state["messages"][-1], data["answer"])


def _chat_model(sampling: dict[str, Any], extra_kwargs: dict[str, Any]) -> Any:
    """From what the trainer passes inline; in `subproc` mode it passes nothing, and `ChatOpenAI`
    reads `OPENAI_BASE_URL` and `OPENAI_API_KEY` by itself."""
    names = {"base_url": "base_url", "api_key": "api_key", "http_client": "http_async_client"}
    given = {
        theirs: extra_kwargs[ours]
        for ours, theirs in names.items()
        if extra_kwargs.get(ours) is not None
    }
    # No retries: a retried call would leave a sibling turn that nothing continues.
    return ChatOpenAI(max_retries=0, **sampling, **given)


def _calculator() -> Any:
    function = CALCULATOR_TOOL["function"]

    def use(**arguments: Any) -> str:
        return use_calculator(function["name"], json.dumps(arguments))

    return StructuredTool.from_function(
        use,
        name=function["name"],
        description=function["description"],
        args_schema=function["parameters"],
    )


def _grade(message: Any, answer: str) -> float:
    if message.response_metadata.get("finish_reason") == "length":
        return 0.0
    return grade_math(message.text, answer)
