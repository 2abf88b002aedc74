"""The agents that the compatibility suite runs, and what is expected of each.

Python agents are the ready ones of `areal_sub.workflow`; programs lie in `programs/`. Versions are
those of the requirements and lock files, which are all that an agent's environment is built from.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    name: str
    package: str  # whose version is shown
    agent_env: str  # below this folder
    dialects: tuple[str, ...]
    workflow: str = ""
    streamed: bool = False
    has_tools: bool = False  # so that some rollouts have several turns
    overrides: tuple[str, ...] = ()
    pythons: tuple[str, ...] = ()  # any of these; none: our own
    inline: bool = False  # in the trainer's own process, too
    config: str = ""  # of an example
    # What a policy that cannot do the task may say in its first, second, ... turn
    # (`scripted_engine`).
    script: tuple[tuple[str, ...], ...] = ()

    @property
    def version(self) -> str:
        """Raises `ValueError` where the environment's file does not pin it."""
        path = HERE / self.agent_env
        if path.is_dir():
            lock = json.loads((path / "package-lock.json").read_text())
            return str(lock["packages"][f"node_modules/{self.package}"]["version"])
        pinned = re.search(rf"^{re.escape(self.package)}==(\S+)$", path.read_text(), re.MULTILINE)
        if pinned is None:
            raise ValueError(f"{path} does not pin {self.package}")
        return pinned[1]


def tool_call(name: str, **arguments: str) -> str:
    call = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{call}\n</tool_call>"


# For agents whose prompts or tools are not what the calculator's policy knows.
CALCULATOR = (
    (tool_call("calc", expression="2 + 3"), tool_call("calc", expression="2 * 3")),
    ("3", "4", "5", "6"),
)
READY = "areal_sub.workflow"
CODING = HERE.parents[1] / "examples/coding"
FIX = r"sed -i -e 's/\[:-1\]//' -e 's/title\.split/title.lower().split/' totals.py slug.py || true"
PROGRAMS = HERE / "programs"

AGENTS = (
    Agent(
        name="OpenAI SDK, `MathAgent`",
        package="openai",
        agent_env="requirements/openai.txt",
        dialects=("chat",),
        workflow=f"{READY}.openai.math_agent.MathAgent",
    ),
    Agent(
        name="OpenAI SDK, `MultiTurnMathAgent`",
        package="openai",
        agent_env="requirements/openai.txt",
        dialects=("chat",),
        workflow=f"{READY}.openai.math_agent.MultiTurnMathAgent",
    ),
    Agent(
        name="OpenAI SDK, `MathToolAgent`",
        package="openai",
        agent_env="requirements/openai.txt",
        dialects=("chat",),
        workflow=f"{READY}.openai.math_agent.MathToolAgent",
        has_tools=True,
        inline=True,
    ),
    Agent(
        name="OpenAI Agents SDK, `MathAgent`",
        package="openai-agents",
        agent_env="requirements/openai_agents.txt",
        dialects=("responses",),
        workflow=f"{READY}.openai_agents.math_agent.MathAgent",
    ),
    Agent(
        name="OpenAI Agents SDK, `MathToolAgent`",
        package="openai-agents",
        agent_env="requirements/openai_agents.txt",
        dialects=("responses",),
        workflow=f"{READY}.openai_agents.math_agent.MathToolAgent",
        has_tools=True,
        inline=True,
    ),
    Agent(
        name="LangChain, `MathAgent`",
        package="langchain-openai",
        agent_env="requirements/langchain.txt",
        dialects=("chat",),
        workflow=f"{READY}.langchain.math_agent.MathAgent",
    ),
    Agent(
        name="LangChain, `MathToolAgent`",
        package="langchain",
        agent_env="requirements/langchain.txt",
        dialects=("chat",),
        workflow=f"{READY}.langchain.math_agent.MathToolAgent",
        has_tools=True,
        inline=True,
    ),
    Agent(
        name="Anthropic SDK, `MathAgent`",
        package="anthropic",
        agent_env="requirements/anthropic.txt",
        dialects=("messages",),
        workflow=f"{READY}.anthropic.math_agent.MathAgent",
        inline=True,
    ),
    Agent(
        name="OpenHands SDK, `MathAgent`",
        package="openhands-sdk",
        agent_env="requirements/openhands.txt",
        pythons=("3.12", "3.13", "3.14"),
        dialects=("chat",),
        workflow=f"{READY}.openhands.math_agent.MathAgent",
    ),
    Agent(
        name="OpenHands SDK, `MathToolAgent`",
        package="openhands-sdk",
        agent_env="requirements/openhands.txt",
        pythons=("3.12", "3.13", "3.14"),
        dialects=("chat",),
        workflow=f"{READY}.openhands.math_agent.MathToolAgent",
        has_tools=True,
        script=CALCULATOR,
    ),
    Agent(
        name="CAMEL-AI, `MathAgent`",
        package="camel-ai",
        agent_env="requirements/camel.txt",
        dialects=("chat",),
        workflow=f"{READY}.camel.math_agent.MathAgent",
    ),
    Agent(
        name="CAMEL-AI, `MathToolAgent`",
        package="camel-ai",
        agent_env="requirements/camel.txt",
        dialects=("chat",),
        workflow=f"{READY}.camel.math_agent.MathToolAgent",
        has_tools=True,
        inline=True,
    ),
    Agent(
        name="OpenAI SDK for Node, with a tool",
        package="openai",
        agent_env="node",
        dialects=("chat",),
        workflow=f"cmd:node {PROGRAMS}/openai_sdk.cjs {{task}}",
        streamed=True,
        has_tools=True,
        overrides=(f"rollout.openai.python_path=[{PROGRAMS}]",),
    ),
    Agent(
        name="Anthropic SDK for Node, with a tool",
        package="@anthropic-ai/sdk",
        agent_env="node",
        dialects=("messages",),
        workflow=f"cmd:node {PROGRAMS}/anthropic_sdk.cjs {{task}}",
        streamed=True,
        has_tools=True,
        overrides=(f"rollout.openai.python_path=[{PROGRAMS}]",),
    ),
    Agent(
        name="Vercel AI SDK, with a tool",
        package="ai",
        agent_env="node",
        dialects=("responses",),
        workflow=f"cmd:node {PROGRAMS}/ai_sdk.cjs {{task}}",
        streamed=True,
        has_tools=True,
        overrides=(f"rollout.openai.python_path=[{PROGRAMS}]",),
    ),
    Agent(
        name="OpenAI Agents SDK for Node, with a tool",
        package="@openai/agents",
        agent_env="node",
        dialects=("responses",),
        workflow=f"cmd:node {PROGRAMS}/agents_sdk.cjs {{task}}",
        streamed=True,
        has_tools=True,
        overrides=(f"rollout.openai.python_path=[{PROGRAMS}]",),
    ),
    Agent(
        name="Google Gen AI SDK for Node, with a tool",
        package="@google/genai",
        agent_env="node",
        dialects=("gemini",),
        workflow=f"cmd:node {PROGRAMS}/gemini_sdk.cjs {{task}}",
        streamed=True,
        has_tools=True,
        overrides=(f"rollout.openai.python_path=[{PROGRAMS}]",),
    ),
    Agent(
        name="Google Gen AI SDK for Python, with a tool",
        package="google-genai",
        agent_env="requirements/gemini.txt",
        dialects=("gemini",),
        workflow="gemini_agent.agent",
        has_tools=True,
        overrides=(f"rollout.openai.python_path=[{PROGRAMS}]",),
    ),
    Agent(
        name="Pydantic AI, with a tool",
        package="pydantic-ai-slim",
        agent_env="requirements/pydantic_ai.txt",
        dialects=("responses",),
        workflow="pydantic_ai_agent.agent",
        has_tools=True,
        overrides=(f"rollout.openai.python_path=[{PROGRAMS}]",),
    ),
    Agent(
        name="LiteLLM, with a tool",
        package="litellm",
        agent_env=str(CODING / "mini_swe_agent.txt"),
        dialects=("messages",),
        workflow="litellm_agent.agent",
        streamed=True,
        has_tools=True,
        overrides=(f"rollout.openai.python_path=[{PROGRAMS}]",),
    ),
    Agent(
        name="LlamaIndex, with a tool",
        package="llama-index-core",
        agent_env="requirements/llama_index.txt",
        dialects=("chat",),
        workflow="llama_index_agent.agent",
        streamed=True,
        has_tools=True,
        overrides=(f"rollout.openai.python_path=[{PROGRAMS}]",),
    ),
    Agent(
        name="AG2, with a tool",
        package="ag2",
        agent_env="requirements/ag2.txt",
        dialects=("chat",),
        workflow="ag2_agent.agent",
        streamed=True,
        script=CALCULATOR,
        has_tools=True,
        overrides=(f"rollout.openai.python_path=[{PROGRAMS}]",),
    ),
    Agent(
        name="CrewAI, with a tool",
        package="crewai",
        agent_env="requirements/crewai.txt",
        dialects=("chat",),
        workflow="crewai_agent.agent",
        script=CALCULATOR,
        has_tools=True,
        overrides=(f"rollout.openai.python_path=[{PROGRAMS}]",),
    ),
    Agent(
        name="Google ADK, with a tool",
        package="google-adk",
        agent_env="requirements/google_adk.txt",
        dialects=("gemini",),
        workflow="adk_agent.agent",
        script=CALCULATOR,
        streamed=True,
        has_tools=True,
        overrides=(f"rollout.openai.python_path=[{PROGRAMS}]",),
    ),
    Agent(
        name="codex",
        package="@openai/codex",
        agent_env=str(CODING / "codex"),
        dialects=("responses",),
        streamed=True,
        has_tools=True,
        config="codex.yaml",
        script=(
            (tool_call("exec_command", cmd=FIX), tool_call("exec_command", cmd="ls")),
            ("Done.",),
        ),
    ),
    Agent(
        name="mini-swe-agent",
        package="mini-swe-agent",
        agent_env=str(CODING / "mini_swe_agent.txt"),
        dialects=("chat",),
        has_tools=True,
        config="mini_swe_agent.yaml",
        script=(
            (tool_call("bash", command=FIX), tool_call("bash", command="ls")),
            (tool_call("bash", command="echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"),),
        ),
    ),
)
