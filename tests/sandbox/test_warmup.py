"""The OpenAI SDK in a zygote: warm, with TLS contexts in stock, and not otherwise changed."""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from sandbox import ChildReport, warmup

openai = pytest.importorskip("openai")

AGENT = """
import json, ssl, threading, time
import openai

async def agent(data):
    started = time.perf_counter()
    clients = [openai.AsyncOpenAI() for _ in range(data["clients"])]
    made_s = time.perf_counter() - started
    answer = await clients[0].chat.completions.create(
        model="any", messages=[{"role": "user", "content": "hello"}])
    return {"content": answer.choices[0].message.content, "made_s": made_s,
            "base_url": str(clients[0].base_url), "threads": threading.active_count(),
            "os": openai._base_client.platform_headers("1", platform=None)["X-Stainless-OS"]}
"""

ANSWER = {
    "id": "c",
    "object": "chat.completion",
    "created": 1,
    "model": "any",
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "hello yourself"},
        }
    ],
}


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n")[0]))
    body = json.dumps(ANSWER).encode()
    writer.write(
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(body), body)
    )
    await writer.drain()
    writer.close()
    await writer.wait_closed()


def test_an_sdk_agent_calls_the_url_of_its_environment(lab: Any, code: Path, door: Any) -> None:
    (code / "caller.py").write_text(AGENT)

    async def go() -> tuple[list[str], list[ChildReport]]:
        async with door(lab.tier, serve) as opened:
            url = f"http://127.0.0.1:{opened.port}/k/key/v1"
            env = {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "key"}
            zygote = await lab.start(
                "caller:agent",
                python=sys.executable,
                python_path=[str(code)],
                timeout_s=60.0,
                port=opened.port,
            )
            try:
                runs = [
                    zygote.run({"clients": num}, env=env, on_listener=opened.on_listener)
                    for num in (1, 2 * warmup.NUM_TLS_CONTEXTS)
                ]
                return zygote.notes, list(await asyncio.gather(*runs))
            finally:
                await zygote.close()

    notes, reports = lab.run(go())
    assert notes == [], "single-threaded, and all was warmed"
    for report in reports:
        assert report.error == ""
        assert report.value["content"] == "hello yourself"
        assert report.value["base_url"].endswith("/k/key/v1/")
        assert report.value["threads"] == 1, "none was started to ask for the platform"
        assert report.value["os"] == openai._base_client.get_platform()


def test_the_sdk_knows_its_platform_and_asks_threads_for_all_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []

    def asyncify(function: Any) -> Any:
        async def in_a_thread() -> Any:
            asked.append(function)
            return function()

        return in_a_thread

    sdk: Any = types.ModuleType("sdk._base_client")
    sdk.asyncify, sdk.get_platform = asyncify, lambda: "Linux"
    monkeypatch.setitem(sys.modules, "sdk._base_client", sdk)
    warmup._know_platform("sdk")
    warmup._know_platform("sdk")  # once is enough
    assert sdk.asyncify.__wrapped__ is asyncify
    assert asyncio.run(sdk.asyncify(sdk.get_platform)()) == "Linux"
    assert asked == []
    sdk.get_platform = lambda: "FreeBSD"  # the agent's own
    assert asyncio.run(sdk.asyncify(sdk.get_platform)()) == "FreeBSD"
    assert asked == [sdk.get_platform]
    warmup._know_platform("no_such_sdk")


def test_stocked_contexts_are_handed_out_once_and_only_for_the_same_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[dict[str, Any]] = []

    def make(**kwargs: Any) -> ssl.SSLContext:
        made.append(kwargs)
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    take = warmup._stocked(make, [{"cafile": "a"}])
    assert len(made) == warmup.NUM_TLS_CONTEXTS
    contexts = [take(cafile="a") for _ in range(warmup.NUM_TLS_CONTEXTS + 2)]
    assert len(set(map(id, contexts))) == len(contexts), "no two callers share one"
    assert len(made) == warmup.NUM_TLS_CONTEXTS + 2
    take(cafile="b")
    assert made[-1] == {"cafile": "b"}
    take = warmup._stocked(make, [{"cafile": "a"}])
    monkeypatch.setenv("SSL_CERT_FILE", "/another/authority.pem")
    num_made = len(made)
    take(cafile="a")
    assert len(made) == num_made + 1, "made under other variables, it does not fit"


def test_a_client_that_needs_several_contexts_finds_as_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with proxies in the environment: one for each of them."""
    made: list[dict[str, Any]] = []
    factory: Any = types.ModuleType("factory")
    factory.make = lambda **kwargs: made.append(kwargs)
    monkeypatch.setitem(sys.modules, "factory", factory)
    calls: list[dict[str, Any]] = [{"a": 1}] * 4 * warmup.NUM_WARM_CLIENTS
    warmup._stock_tls_contexts({("factory", "make"): [*calls, {"b": 1}]})
    assert made.count({"a": 1}) == 4 * warmup.NUM_TLS_CONTEXTS
    assert made.count({"b": 1}) == warmup.NUM_TLS_CONTEXTS


CLIENTS = """
import importlib, ssl
import {name}

def stocks():
    factories = [ssl.create_default_context]
    try:
        factories.append(importlib.import_module("httpcore2").default_ssl_context)
    except (ImportError, AttributeError):
        pass
    return sum(len(getattr(each, "sandbox_stock", [])) for each in factories)

def agent(data):
    before = stocks()
    client = {make}
    return [before, before - stocks()]
"""


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("httpx", "httpx.Client()"),
        ("httpx2", "httpx2.AsyncClient()"),
        ("anthropic", "anthropic.AsyncAnthropic(api_key='k')"),
        ("openai", "openai.OpenAI(api_key='k')"),
    ],
)
def test_clients_that_the_agent_imports_are_warm(
    lab: Any, code: Path, name: str, make: str
) -> None:
    pytest.importorskip(name)
    (code / "clients.py").write_text(CLIENTS.format(name=name, make=make))

    async def go() -> tuple[list[str], ChildReport]:
        options: dict[str, Any] = {"python": sys.executable, "python_path": [str(code)]}
        zygote = await lab.start("clients:agent", timeout_s=60.0, **options)
        try:
            return zygote.notes, await zygote.run(None)
        finally:
            await zygote.close()

    notes, report = lab.run(go())
    assert (notes, report.error) == ([], "")
    num_in_stock, num_taken = report.value
    assert num_in_stock >= warmup.NUM_TLS_CONTEXTS
    assert num_taken >= 1, "the client's TLS context was ready"


def test_a_module_of_the_agents_own_named_like_an_sdk_is_left_alone(lab: Any, code: Path) -> None:
    (code / "agents.py").write_text("class Agent:\n    num_made = 0\n")
    (code / "own.py").write_text(
        "import openai\nimport agents\ndef agent(data):\n    return agents.Agent.num_made\n"
    )

    async def go() -> tuple[list[str], ChildReport]:
        options: dict[str, Any] = {"python": sys.executable, "python_path": [str(code)]}
        zygote = await lab.start("own:agent", timeout_s=60.0, **options)
        try:
            return zygote.notes, await zygote.run(None)
        finally:
            await zygote.close()

    notes, report = lab.run(go())
    assert (notes, report.value) == ([], 0)


def test_an_environment_without_sdks_is_not_warmed(lab: Any, code: Path) -> None:
    (code / "plain.py").write_text(
        "import sys\n"
        "def agent(data):\n"
        "    return [name in sys.modules for name in ('asyncio', 'ssl')]\n"
    )

    async def go() -> tuple[list[str], ChildReport]:
        zygote = await lab.start("plain:agent", python_path=[str(code)])
        try:
            return zygote.notes, await zygote.run(None)
        finally:
            await zygote.close()

    notes, report = lab.run(go())
    assert (notes, report.value) == ([], [False, False])


def test_the_loop_of_the_agent_is_left_alone(lab: Any, code: Path) -> None:
    """Its import may set an event loop policy; a warm-up call neither replaces nor closes it.
    (From Python 3.12 on, no fork has a current loop.)"""
    (code / "loops.py").write_text(
        "import asyncio, sys\nimport httpx\n"
        "class Own(asyncio.DefaultEventLoopPolicy):\n    pass\n"
        "asyncio.set_event_loop_policy(Own())\n"
        "LOOP = asyncio.new_event_loop()\nasyncio.set_event_loop(LOOP)\n"
        "def agent(data):\n"
        "    policy = asyncio.get_event_loop_policy()\n"
        "    is_current = sys.version_info >= (3, 12) or policy.get_event_loop() is LOOP\n"
        "    return [type(policy).__name__, is_current, LOOP.is_closed()]\n"
    )

    async def go() -> ChildReport:
        options: dict[str, Any] = {"python": sys.executable, "python_path": [str(code)]}
        zygote = await lab.start("loops:agent", timeout_s=60.0, **options)
        try:
            return await zygote.run(None)
        finally:
            await zygote.close()

    assert lab.run(go()).value == ["Own", True, False]
