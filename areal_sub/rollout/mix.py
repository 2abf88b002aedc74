"""Which agents a run has, and which of them attempts what. Pure."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from areal_sub.rollout.command import Command


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """One agent: an import path, dill bytes of one that has no import path, or a program."""

    target: str = ""
    pickled: bytes = b""
    workflow_kwargs: dict[str, Any] = field(default_factory=dict)
    command: Command | None = None
    name: str = ""  # "" where it is the only one
    weight: float = 1.0
    python: str = ""  # its interpreter; "": our own
    readable: tuple[str, ...] = ()  # what its environment needs to read
    env: Mapping[str, str] = field(default_factory=dict)  # what its environment needs to be set


@dataclass(frozen=True, slots=True)
class AgentMix:
    """Agents by weight."""

    agents: tuple[Agent, ...]
    seed: int

    def pick(self, key: str) -> Agent:
        """The agent for `key`: the same for the same key and seed, in any process. The siblings of
        a group are one agent's, or they would have no common baseline."""
        if len(self.agents) == 1:
            return self.agents[0]
        draw = random.Random(f"{self.seed}/{key}")
        (agent,) = draw.choices(self.agents, [agent.weight for agent in self.agents])
        return agent
