"""The reasoning-gym agent: what counts as the answer, its score, and the call it makes."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

pytest.importorskip("reasoning_gym")

from areal_sub.workflow.openai.reasoning_gym_agent import ReasoningGymAgent, extract_answer, score

CHAIN_SUM: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What is 1 + 2?"}],
    "question": "What is 1 + 2?",
    "answer": "3",
    "metadata": {},
    "reasoning_gym": {"task": "chain_sum", "parameters": {"max_terms": 2}},
}
SPELL: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Spell this word backward: sand"}],
    "question": "Spell this word backward: sand",
    "answer": "dnas",
    "metadata": {},
    "reasoning_gym": {"task": "spell_backward", "parameters": {}},
}


@pytest.mark.parametrize(
    ("text", "truth", "answer"),
    [
        ("<answer>7</answer> or <answer> 3 </answer> 9", "3", "3"),
        ("The answer is 3", "3", "3"),
        ("The answer is 1 + 2 = 3.", "3", "3"),
        ("1 + 2 = 3\n\nThat is it.", "3", "3"),
        ("so \\boxed{-12} it is", "-12", "-12"),
        ("It is 1,200 of 50.5", "3", "50.5"),
        ("no number here", "3", ""),
        ("", "3", ""),
        ("Let me see.\nThe answer is: **dnas**.", "dnas", "dnas"),
        ("Let me see.\n`dnas`\n", "dnas", "dnas"),
        ("Answer: dnas", "dnas", "dnas"),
        ("", "dnas", ""),
        ("1 2\n3 4\n", "1 2\n3 4", "1 2\n3 4"),
        ("So:\n<answer>1 2\n3 4</answer>", "1 2\n3 4", "1 2\n3 4"),
        (" anything\nat all ", None, "anything\nat all"),
    ],
)
def test_the_answer_in_a_text(text: str, truth: str | None, answer: str) -> None:
    assert extract_answer(text, truth) == answer


@pytest.mark.parametrize(
    ("text", "data", "reward"),
    [
        ("The answer is 3", CHAIN_SUM, 1.0),
        ("The answer is 13", CHAIN_SUM, 0.5),  # chain_sum's own partial credit
        ("The answer is 4", CHAIN_SUM, 0.0),
        ("", CHAIN_SUM, 0.0),
        ("dnas", SPELL, 1.0),
        ("dnsa", SPELL, 0.5),
        ("sand", SPELL, 0.0),
    ],
)
def test_the_score_is_the_tasks_own(text: str, data: dict[str, Any], reward: float) -> None:
    assert score(text, data) == reward


@pytest.fixture
def endpoint() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An OpenAI endpoint that always says "The answer is 3", and the requests it got."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            requests.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            message = {"role": "assistant", "content": "The answer is 3"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            body = {"id": "c", "object": "chat.completion", "created": 0, "model": "m"}
            raw = json.dumps({**body, "choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
        server.shutdown()
        thread.join()


def test_one_call_of_the_sdk_is_scored(endpoint: tuple[str, list[dict[str, Any]]]) -> None:
    base_url, requests = endpoint
    agent = ReasoningGymAgent(system_prompt="Be brief.", temperature=0.5)
    reward = asyncio.run(agent.run(CHAIN_SUM, base_url=base_url, api_key="key"))
    assert reward == 1.0
    assert requests == [
        {
            "model": "default",
            "temperature": 0.5,
            "messages": [{"role": "system", "content": "Be brief."}, *CHAIN_SUM["messages"]],
        }
    ]


def test_without_a_system_prompt_the_tasks_messages_are_all(
    endpoint: tuple[str, list[dict[str, Any]]],
) -> None:
    base_url, requests = endpoint
    asyncio.run(ReasoningGymAgent().run(CHAIN_SUM, base_url=base_url, api_key="key"))
    assert requests[0]["messages"] == CHAIN_SUM["messages"]
