"""The ready math agents, with the real SDK over HTTP against a server that says what it is told."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest

from areal_sub.workflow.openai.client import openai_client
from areal_sub.workflow.openai.math_agent import (
    CALCULATOR_TOOL,
    MathAgent,
    MathToolAgent,
    MultiTurnMathAgent,
    use_calculator,
)

TASK = {"messages": [{"role": "user", "content": "What is 7 * 8?"}], "answer": "56"}


class Endpoint:
    """Answers call after call with the next of `says`: a text, or a list of (tool, arguments)."""

    def __init__(self) -> None:
        self.says: list[Any] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.base_url = ""

    def answer(self, request: dict[str, Any], key: str | None) -> dict[str, Any]:
        number = len(self.requests)
        self.requests.append(request)
        self.keys.append(key)
        said = self.says[number]
        message: dict[str, Any] = {"role": "assistant", "content": None}
        if isinstance(said, str):
            message["content"] = said
        else:
            message["tool_calls"] = [
                {
                    "id": f"call-{number}-{index}",
                    "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
                for index, (name, arguments) in enumerate(said)
            ]
        reason = "stop" if isinstance(said, str) else "tool_calls"
        choice = {"index": 0, "message": message, "finish_reason": reason}
        body = {"object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        return {"id": f"turn-{number}", **body}


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    state = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if len(state.requests) < len(state.says):
                status, body = 200, state.answer(request, self.headers["authorization"])
            else:
                status, body = 500, {"error": {"message": "no more to say"}}
                state.requests.append(request)
            raw = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.base_url = f"http://127.0.0.1:{server.server_port}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        server.shutdown()
        thread.join()


def run(agent: Any, endpoint: Endpoint) -> Any:
    return asyncio.run(agent.run(TASK, base_url=endpoint.base_url, api_key="key"))


def expression(text: str) -> str:
    return json.dumps({"expression": text})


@pytest.mark.parametrize(("text", "reward"), [("It is 56.", 1.0), ("It is 54.", 0.0), ("", 0.0)])
def test_one_answer_is_graded(endpoint: Endpoint, text: str, reward: float) -> None:
    endpoint.says = [text]
    assert run(MathAgent(temperature=0.5, max_completion_tokens=7), endpoint) == reward
    assert endpoint.keys == ["Bearer key"]
    assert endpoint.requests == [
        {
            "model": "default",
            "messages": TASK["messages"],
            "temperature": 0.5,
            "max_completion_tokens": 7,
        }
    ]


def test_a_wrong_answer_is_asked_again_and_each_turn_has_its_reward(endpoint: Endpoint) -> None:
    endpoint.says = ["54", "56"]
    assert run(MultiTurnMathAgent(), endpoint) == {"turn-0": 0.0, "turn-1": 1.0}
    roles = [message["role"] for message in endpoint.requests[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert len(TASK["messages"]) == 1, "the task itself is left alone"


def test_asking_again_has_an_end(endpoint: Endpoint) -> None:
    endpoint.says = ["1", "2"]
    assert run(MultiTurnMathAgent(max_turns=2), endpoint) == {"turn-0": 0.0, "turn-1": 0.0}


def test_the_tools_result_comes_back_to_the_model(endpoint: Endpoint) -> None:
    endpoint.says = [[("calc", expression("7 * 8"))], "The answer is 56"]
    assert run(MathToolAgent(), endpoint) == 1.0
    first, second = endpoint.requests
    assert first["tools"] == second["tools"] == [CALCULATOR_TOOL]
    assistant, tool = second["messages"][1:]
    assert assistant["role"] == "assistant"
    assert assistant["tool_calls"][0]["function"]["arguments"] == expression("7 * 8")
    assert tool == {"role": "tool", "tool_call_id": "call-0-0", "content": "56"}


def test_each_of_several_calls_is_answered(endpoint: Endpoint) -> None:
    endpoint.says = [[("calc", expression("7 * 8")), ("search", "{}")], "54"]
    assert run(MathToolAgent(), endpoint) == 0.0
    results = endpoint.requests[1]["messages"][-2:]
    assert [result["tool_call_id"] for result in results] == ["call-0-0", "call-0-1"]
    assert results[1]["content"] == "error: there is no tool 'search', only 'calc'"


def test_calling_tools_has_an_end(endpoint: Endpoint) -> None:
    endpoint.says = [[("calc", expression("7 * 8"))]] * 2
    assert run(MathToolAgent(max_turns=2), endpoint) == 0.0
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ("{", "the arguments must be"),
        ("[1]", "the arguments must be"),
        ("null", "the arguments must be"),
        ("{}", "the arguments must be"),
        ('{"expression": 7}', "the arguments must be"),
        ("[" * 100_000, "the arguments must be"),
        (expression("7 *"), "not an arithmetic expression"),
        (expression("1 / 0"), "division by zero"),
    ],
)
def test_a_call_that_fails_tells_the_model_why(arguments: str, what: str) -> None:
    result = use_calculator("calc", arguments)
    assert result.startswith("error: ")
    assert what in result


def test_a_failed_call_is_not_repeated(endpoint: Endpoint) -> None:
    with pytest.raises(openai.InternalServerError, match="no more to say"):
        run(MathAgent(), endpoint)
    assert len(endpoint.requests) == 1


def test_nothing_passed_means_the_environment(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint.base_url)
    monkeypatch.setenv("OPENAI_API_KEY", "from-the-environment")
    endpoint.says = ["56"]
    assert asyncio.run(MathAgent().run(TASK)) == 1.0
    assert endpoint.keys == ["Bearer from-the-environment"]


def test_a_shared_http_client_is_used_and_left_open(endpoint: Endpoint) -> None:
    endpoint.says = ["56", "56"]

    async def two_rollouts() -> list[float]:
        async with openai.DefaultAsyncHttpxClient() as shared:
            given = {"base_url": endpoint.base_url, "api_key": "key", "http_client": shared}
            rewards = [await MathAgent().run(TASK, **given) for _ in range(2)]
            assert not shared.is_closed
        return rewards

    assert asyncio.run(two_rollouts()) == [1.0, 1.0]


def test_an_own_client_is_closed(endpoint: Endpoint) -> None:
    endpoint.says = ["56"]

    async def use() -> openai.AsyncOpenAI:
        async with openai_client({"base_url": endpoint.base_url, "api_key": "key"}) as client:
            await client.chat.completions.create(model="m", messages=[])
            assert not client.is_closed()
        return client

    assert asyncio.run(use()).is_closed()


def test_importing_the_module_does_not_import_the_sdk() -> None:
    code = (
        "import sys, areal_sub.workflow.openai.math_agent\n"
        "heavy = {'openai', 'torch', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
