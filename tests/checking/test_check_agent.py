"""`areal-sub check-agent` as a user calls it: real children, the real proxy, a scripted model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.timeout(180)


def check(*words: str, cwd: Path = HERE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "areal_sub", "check-agent", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=150)


def found(*words: str) -> dict[str, Any]:
    done = check(*words, "--json")
    assert done.stdout, done.stderr
    shown: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if shown["trainable"] else 1)
    return shown


def test_a_ready_agent_can_be_trained_as_it_is() -> None:
    done = check("areal_sub.workflow.openai.math_agent.MathToolAgent", "--num", "1")
    assert done.returncode == 0, done.stderr
    assert "It can be trained as it is, token for token." in done.stdout
    assert "offered in 3 calls, used by 2" in done.stdout
    assert "nowhere.invalid" not in done.stdout


def test_what_an_agent_does_to_its_history_is_told() -> None:
    shown = found("checked_agents.edits_history", "--num", "1")
    assert shown["trainable"], shown
    assert shown["dialects"] == {"chat": 2, "responses": 1}
    assert shown["models"] == {"big": 2, "small": 1}
    assert (shown["num_streamed"], shown["num_side_requests"]) == (1, 1)
    assert shown["forks"] == {"assistant_edited": 1, "side_request": 1}
    notes = "\n".join(shown["notes"])
    assert "keep content and tool calls as they came" in notes
    assert "rollout.openai.credit=main" in notes


def test_structured_output_and_what_it_wants_to_reach() -> None:
    shown = found("checked_agents.wants_more", "--num", "1")
    assert shown["num_constrained"] == 1
    assert [attempt["reward"] for attempt in shown["attempts"]] == [0.5]
    assert shown["attempts"][0]["stderr_tail"] == "HF_HUB_OFFLINE=1", "at its import, too"
    assert shown["egress_refused"] == {"api.example.com:443": 1}
    assert any("network.allow=[api.example.com:443]" in note for note in shown["notes"])


def test_an_agent_that_cannot_read_what_the_script_says_is_told_of_other_scripts() -> None:
    shown = found("checked_agents.wants_a_format", "--num", "1")
    assert any("--script FILE" in note for note in shown["notes"])
    shown = found(
        "checked_agents.wants_a_format", "--num", "1", "--script", '["{\\"answer\\": 56}"]'
    )
    assert [attempt["reward"] for attempt in shown["attempts"]] == [56.0]
    assert not shown["notes"]


def test_an_agent_that_ignores_no_proxy_is_checked_without_a_proxy() -> None:
    shown = found("checked_agents.ignores_no_proxy", "--num", "1")
    assert shown["trainable"], shown
    assert [attempt["reward"] for attempt in shown["attempts"]] == [1.0]
    assert "was not looked at" in shown["sandbox"]
    assert any("whatever NO_PROXY says" in note for note in shown["notes"])


def test_an_agent_that_calls_no_model_and_gives_no_reward() -> None:
    done = check("checked_agents.never_calls", "--num", "1")
    assert done.returncode == 1
    assert "none: no model call was seen" in done.stdout
    assert "nothing was sampled" in done.stdout
    assert "OPENAI_BASE_URL" in done.stdout
    assert "It cannot be trained as it is." in done.stdout
    assert "\x1b" not in done.stdout, "what an agent prints does not reach the terminal"


def test_an_agent_that_read_its_address_too_early_is_told_so() -> None:
    shown = found("checked_agents.asks_elsewhere", "--num", "1")
    assert shown["egress_refused"] == {"api.openai.com:443": 1}
    assert shown["notes"][-1].startswith("it asked api.openai.com:443 for a model 1 times")
    assert not any("network.allow" in note for note in shown["notes"])


def test_a_client_that_is_made_with_its_module_needs_a_fresh_interpreter() -> None:
    done = check("client_at_import.agent")
    assert done.returncode == 2
    assert "set rollout.openai.sandbox.start=exec" in done.stderr
    shown = found("client_at_import.agent", "rollout.openai.sandbox.start=exec")
    assert [attempt["reward"] for attempt in shown["attempts"]] == [1.0, 1.0]


def test_an_agent_with_a_wrong_base_is_told_so() -> None:
    notes = found("checked_agents.doubles_its_base", "--num", "1")["notes"]
    assert notes[-1].startswith("1 of its calls asked for what is not served")
    assert not any("OPENAI_BASE_URL" in note or "no business" in note for note in notes)


def test_an_agent_that_fails_first_is_told_of_that_first() -> None:
    shown = found("checked_agents.takes_nothing", "--num", "1")
    assert shown["notes"][0].startswith("a run ended as exception: TypeError: takes_nothing()")
    assert shown["notes"][1:] == [
        "an agent is called with the task: async def agent(data), or in a class "
        "async def run(self, data, **extra_kwargs)"
    ]


def test_calls_that_were_refused_are_told() -> None:
    shown = found("checked_agents.makes_do_without", "--num", "1")
    assert [attempt["num_refused"] for attempt in shown["attempts"]] == [1]
    assert shown["notes"][0].startswith("1 of its calls was refused")
    assert not any("OPENAI_BASE_URL" in note for note in shown["notes"])


def test_a_program_with_a_script_and_a_task(tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text(json.dumps({"word": "forty-two"}))
    shown = found(
        f"cmd:{sys.executable} raw_program.py {{word}}",
        *("--task", str(tmp_path / "task.json"), "--script", '["forty-two"]', "--num", "1"),
    )
    assert shown["trainable"], shown
    assert [attempt["reward"] for attempt in shown["attempts"]] == [1.0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "which agent?"),
        (["no_such_module.agent"], "no_such_module"),
        (["a.b", "--task", "[1]"], "a JSON object"),
        (["a.b", "--script", "nowhere.json"], "--script: neither JSON nor a file"),
        (["a.b", "--script", "[]"], "--script: a JSON array of texts"),
        (["a.b", "--nonsense"], "--nonsense"),
        (["a.b", "rollout.openai.mod=inline"], "did you mean mode"),
    ],
)
def test_input_that_cannot_be_used(words: list[str], said: str) -> None:
    done = check(*words)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr.replace("Traceback (most recent call last):", "", 1)


def test_agents_are_not_shown_what_everybody_keeps() -> None:
    done = check("my_agent.agent", cwd=Path("/tmp"))
    assert done.returncode == 2, done.stderr
    assert "/tmp holds everybody's temporary files" in done.stderr
