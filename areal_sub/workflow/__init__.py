"""What an agent is, to those who write one, and how the one named in a config is found.

An agent is a plain function `agent(data)`, or a class with `run(self, data, **extra_kwargs)`; it
need not know this package. `AgentWorkflow` is the class form with its types written down.
Imported inside children: no heavy imports here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from areal_sub.workflow.resolve import bind_target, describe_target, resolve_target

__all__ = [
    "GRADER_TARGET",
    "GRADER_VARIABLE",
    "AgentWorkflow",
    "bind_target",
    "describe_target",
    "resolve_target",
]

GRADER_TARGET = "areal_sub.workflow.graded:Graded"
"""What the children of graders run."""
GRADER_VARIABLE = "AREAL_SUB_GRADER"
"""Tells it which grader: an import path."""


class AgentWorkflow(ABC):
    """One agent. An instance is made for every rollout, with `workflow_kwargs`."""

    @abstractmethod
    async def run(self, data: dict[str, Any], **extra_kwargs: Any) -> float | dict[str, float]:
        """Attempt the task `data` and return its reward.

        A number is the final reward (of the last turn); a dict gives rewards by completion id.
        With `rollout.openai.mode=inline`, `extra_kwargs` holds `base_url`, `api_key` and the shared
        `http_client` to make an `AsyncOpenAI` from; with `subproc` it is empty, and the environment
        has the base URL and the key where SDKs look for them. Construct clients in here, never at
        module level: the module is imported once, before any rollout exists.
        """
