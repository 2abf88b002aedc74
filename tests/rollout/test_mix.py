"""Which agent attempts what, and what it finds in its environment."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from areal_sub.rollout.environ import (
    SILENCE,
    agent_environment,
    import_environment,
    redirection,
    supervisor_environment,
)
from areal_sub.rollout.mix import Agent, AgentMix

AGENTS = Path(__file__).parents[2] / "docs" / "agents.md"
PICKS = """
from areal_sub.rollout.mix import Agent, AgentMix
mix = AgentMix(tuple(Agent(target=n, name=n, weight=w) for n, w in [("a", 3.0), ("b", 1.0)]), 7)
print("".join(mix.pick(f"g{n:06d}").name for n in range(400)))
"""


def test_agents_are_drawn_by_weight_and_alike_in_every_process() -> None:
    def picks() -> str:
        command = [sys.executable, "-c", PICKS]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    first = picks()
    assert first == picks()
    assert 260 < Counter(first)["a"] < 340
    mix = AgentMix((Agent(target="a", name="a"), Agent(target="b", name="b")), seed=1)
    other = AgentMix(mix.agents, seed=2)
    keys = [str(number) for number in range(64)]
    assert [mix.pick(key) for key in keys] != [other.pick(key) for key in keys]
    assert AgentMix(mix.agents[:1], seed=1).pick("anything").name == "a"


def test_each_dialect_has_its_own_base() -> None:
    env = agent_environment(port=5, key="K", extra={"OPENAI_API_KEY": "mine", "A": "b"})
    assert env["OPENAI_BASE_URL"] == env["LLM_BASE_URL"] == "http://127.0.0.1:5/k/K/v1"
    assert env["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:5/k/K", "its SDK adds /v1/messages"
    assert env["GOOGLE_GEMINI_BASE_URL"] == "http://127.0.0.1:5/k/K", "its SDK adds /v1beta"
    assert {value for name, value in env.items() if name.endswith("_API_KEY")} == {"K"}
    assert env["A"] == "b"
    provider = json.loads(env["OPENCODE_CONFIG_CONTENT"])["provider"]["areal-sub"]
    assert provider["options"] == {"baseURL": env["OPENAI_BASE_URL"], "apiKey": "K"}


def test_what_is_silenced_can_be_heard() -> None:
    loud = agent_environment(port=5, key="K", extra={}, silence=False)
    assert loud.keys() == redirection(port=5, key="K").keys()
    quiet = agent_environment(port=5, key="K", extra={"DO_NOT_TRACK": "0"})
    assert quiet == {**loud, **SILENCE, "DO_NOT_TRACK": "0"}


def test_an_agent_with_variables_of_its_own_is_told_the_address_in_them() -> None:
    extra = {
        "MY_URL": "{base_url}/chat",
        "AZURE_OPENAI_ENDPOINT": "{anthropic_base_url}",
        "MORE": '{"key": "{api_key}", "a": {model}, "b": "{{base_url}}", "c": "{other}"}',
    }
    env = agent_environment(port=5, key="K", extra=extra)
    assert env["MY_URL"] == "http://127.0.0.1:5/k/K/v1/chat"
    assert env["AZURE_OPENAI_ENDPOINT"] == "http://127.0.0.1:5/k/K"
    assert env["MORE"] == '{"key": "K", "a": default, "b": "{base_url}", "c": "{other}"}'
    assert import_environment({**extra, "A": "{{model}}"}, silence=False) == {"A": "{model}"}


def test_an_import_finds_all_but_an_address() -> None:
    extra = {"A": "b", "DO_NOT_TRACK": "0", "OPENAI_API_KEY": "the user's own"}
    assert import_environment(extra) == {**SILENCE, "A": "b", "DO_NOT_TRACK": "0"}
    assert import_environment(extra, silence=False) == {"A": "b", "DO_NOT_TRACK": "0"}


def test_the_page_lists_every_variable() -> None:
    section = AGENTS.read_text().partition("## Variables")[2].partition("\n## ")[0]
    listed = {
        name
        for line in section.splitlines()
        if line.startswith("|")
        for name in re.findall(r"`([A-Z][A-Z0-9_]+)(?:=[^`]*)?`", line.split("|")[1])
    }
    assert listed == agent_environment(port=5, key="K", extra={}).keys()


def test_the_supervisor_starts_with_nothing_but_what_is_known_to_be_no_secret() -> None:
    ours = {
        "PATH": "/bin",
        "LC_CTYPE": "de_DE.UTF-8",
        "TMPDIR": "/var/tmp",
        "LET_THROUGH": "yes",
        "HOME": "/home/user",
        "HF_TOKEN": "canary",
        "LD_PRELOAD": "/canary",
    }
    kept = {"PATH", "LC_CTYPE", "TMPDIR", "LET_THROUGH"}
    assert supervisor_environment(ours, ["LET_THROUGH", "ABSENT"]) == {n: ours[n] for n in kept}
