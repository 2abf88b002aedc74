"""Pays once, in the zygote, for what every child would pay again at its first model call.

Measured on openai 3: fork → client → first call costs about 8 times as much with the imports
alone as after one call of each kind and with TLS contexts in stock. Called by `zygote`: for openai
before the agent's module is imported, so that what the agent patches there stays patched; then for
what else the agent has imported (anthropic, openai-agents, httpx2, httpx).

Nothing of the SDK's behaviour changes, and a failing warm-up is a slower first call, never an
error: it is noted and passed on with the zygote's "ready".
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any

from . import rehearsal

NUM_TLS_CONTEXTS = 4
"""For so many clients each child inherits ready TLS contexts; for more it makes them itself. (A
client needs one, and one more for each proxy that the environment names.)"""
NUM_WARM_CLIENTS = 2
NUM_ROUNDS = 12
"""Of calls. CPython (3.11 and later) rewrites a function's code once it has run often enough: what
it rewrites here is not rewritten, so copied and paid for, in every child."""
STUB_LIFETIME_S = 20
CALL_TIMEOUT_S = 10.0
_OPTIONS = {"api_key": "warm-up", "max_retries": 0, "timeout": CALL_TIMEOUT_S}

_MESSAGE = {
    "id": "warm-up",
    "type": "message",
    "role": "assistant",
    "model": "warm-up",
    "content": [{"type": "tool_use", "id": "call", "name": "warm_up", "input": {}}],
    "stop_reason": "tool_use",
    "stop_sequence": None,
    "usage": {"input_tokens": 1, "output_tokens": 1},
}
_COMPLETION = {
    "id": "warm-up",
    "object": "chat.completion",
    "created": 0,
    "model": "warm-up",
    "choices": [
        {
            "index": 0,
            "finish_reason": "tool_calls",
            "message": {
                "role": "assistant",
                "content": "warm-up",
                "tool_calls": [
                    {
                        "id": "call",
                        "type": "function",
                        "function": {"name": "warm_up", "arguments": "{}"},
                    }
                ],
            },
        }
    ],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}


def stub_listener() -> socket.socket:
    """Where the stub of the model will be served: bound before the process is enclosed."""
    return socket.create_server(("127.0.0.1", 0))


def warm_up(listener: socket.socket) -> list[str]:
    """Import and exercise openai where it is installed. Returns notes on what was not to be."""
    if importlib.util.find_spec("openai") is None:
        return []
    try:
        importlib.import_module("openai")
    except Exception as error:
        return [f"openai could not be warmed up: {type(error).__name__}: {error}"]
    return _exercise("openai", _warm_openai, listener)


def warm_up_imported(listener: socket.socket) -> list[str]:
    """Exercise what the agent's module has imported beside openai. Returns notes."""
    notes: list[str] = []
    for name, warm in _OTHERS.items():
        if name in sys.modules:
            notes += _exercise(name, warm, listener)
    return notes


def rehearse(listener: socket.socket) -> None:
    """Find out which pages a child touches with all of that: see `rehearsal`."""
    with _stub_server(listener) as base_url:
        rehearsal.watch(functools.partial(_call_all, base_url))


def _call_all(base_url: str) -> None:
    signal.alarm(STUB_LIFETIME_S)
    for name, warm in {"openai": _warm_openai, **_OTHERS}.items():
        if name in sys.modules:
            with contextlib.suppress(Exception):  # it was noted, or is what the agent made of it
                warm(base_url)


def _exercise(name: str, warm: Callable[[str], None], listener: socket.socket) -> list[str]:
    try:
        with _stub_server(listener) as base_url:
            with _recorded_tls_contexts() as recorded:
                warm(base_url)
            with _recorded_tls_contexts(reuse=True):
                for _ in range(1, NUM_ROUNDS):
                    warm(base_url)
        _stock_tls_contexts(recorded)
    except Exception as error:
        return [f"{name} could not be warmed up: {type(error).__name__}: {error}"]
    return []


def _warm_openai(base_url: str) -> None:
    openai: Any = sys.modules["openai"]
    _know_platform("openai")
    options = {**_OPTIONS, "base_url": f"{base_url}/v1"}
    request = {"model": "warm-up", "messages": [{"role": "user", "content": "warm-up"}]}

    async def call() -> None:
        async with openai.AsyncOpenAI(**options) as client:
            await client.chat.completions.create(**request)

    _run(call())
    with openai.OpenAI(**options) as client:
        client.chat.completions.create(**request)


def _know_platform(sdk: str) -> None:
    """Give the SDK's clients the answer to what each of them asks a thread of a pool: on which
    platform it is. It is the same in every child, and the two threads that it takes (the second
    ends the pool) are a third of a call."""
    base: Any = sys.modules.get(f"{sdk}._base_client")
    asyncify, get_platform = getattr(base, "asyncify", None), getattr(base, "get_platform", None)
    if asyncify is None or get_platform is None or hasattr(asyncify, "__wrapped__"):
        return
    platform = get_platform()

    async def known() -> Any:
        return platform

    @functools.wraps(asyncify)
    def known_or_asyncify(function: Callable[..., Any]) -> Any:
        return known if function is get_platform else asyncify(function)

    base.asyncify = known_or_asyncify


def _warm_anthropic(base_url: str) -> None:
    anthropic: Any = sys.modules["anthropic"]
    _know_platform("anthropic")
    options = {**_OPTIONS, "base_url": base_url}
    request = {
        "model": "warm-up",
        "max_tokens": 1,
        "messages": [{"role": "user", "content": "warm-up"}],
    }

    async def call() -> None:
        async with anthropic.AsyncAnthropic(**options) as client:
            await client.messages.create(**request)

    _run(call())
    with anthropic.Anthropic(**options) as client:
        client.messages.create(**request)


def _warm_openai_agents(base_url: str) -> None:
    agents: Any = sys.modules["agents"]
    openai: Any = sys.modules["openai"]
    if not all(hasattr(agents, name) for name in _OF_OPENAI_AGENTS):
        return  # a module of the agent's own that has this name

    def warm_up() -> str:
        return "warm"

    async def run() -> None:
        async with openai.AsyncOpenAI(**_OPTIONS, base_url=f"{base_url}/v1") as client:
            model = agents.OpenAIChatCompletionsModel("warm-up", client)
            agent = agents.Agent(name="warm-up", model=model, tools=[agents.function_tool(warm_up)])
            with contextlib.suppress(agents.MaxTurnsExceeded):  # the stub asks for the tool
                await agents.Runner.run(
                    agent,
                    "warm-up",
                    max_turns=1,
                    run_config=agents.RunConfig(tracing_disabled=True),
                )

    _run(run())


def _warm_http(base_url: str, *, name: str) -> None:
    http: Any = sys.modules[name]

    async def call() -> None:
        async with http.AsyncClient(timeout=CALL_TIMEOUT_S) as client:
            await client.post(base_url, json={})

    _run(call())
    with http.Client(timeout=CALL_TIMEOUT_S) as client:
        client.post(base_url, json={})


_OF_OPENAI_AGENTS = (
    *("Agent", "MaxTurnsExceeded", "OpenAIChatCompletionsModel", "RunConfig", "Runner"),
    "function_tool",
)
_OTHERS: Mapping[str, Callable[[str], None]] = {
    "anthropic": _warm_anthropic,
    "agents": _warm_openai_agents,
    "httpx2": functools.partial(_warm_http, name="httpx2"),
    "httpx": functools.partial(_warm_http, name="httpx"),
}


def _run(work: Coroutine[Any, Any, None]) -> None:
    """In a loop of its own that never is the current one: agents find asyncio as it was."""
    import asyncio

    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(work)
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()


@contextlib.contextmanager
def _stub_server(listener: socket.socket) -> Iterator[str]:
    """The URL of a server at `listener` that answers every request with one answer.

    It runs in a forked process: a thread would be lost, and its locks stuck, in every child.
    """
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(STUB_LIFETIME_S)
            _serve(listener)
        finally:
            os._exit(0)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _serve(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as request:
            answer = _MESSAGE if b"/messages" in request.readline() else _COMPLETION
            length = 0
            while (line := request.readline().strip().lower()) != b"":
                if line.startswith(b"content-length:"):
                    length = int(line.partition(b":")[2])
            request.read(length)
            body = json.dumps(answer).encode()
            head = (
                "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n"
                f"content-length: {len(body)}\r\n\r\n"
            )
            connection.sendall(head.encode() + body)


# What makes a client's TLS context when nothing is said about TLS: httpx2's way and httpx's.
_TLS_FACTORIES = (("httpcore2", "default_ssl_context"), ("ssl", "create_default_context"))
_Recorded = dict[tuple[str, str], list[dict[str, Any]]]


@contextlib.contextmanager
def _recorded_tls_contexts(*, reuse: bool = False) -> Iterator[_Recorded]:
    """Records the keyword arguments of each call of each factory. `reuse`: calls that are alike get
    one context, which takes longer to make than all else of a call."""
    recorded: _Recorded = {}
    made: list[tuple[Any, dict[str, Any], Any]] = []
    with contextlib.ExitStack() as undo:
        for module_name, name in _TLS_FACTORIES:
            if importlib.util.find_spec(module_name) is None:
                continue
            module = importlib.import_module(module_name)
            make = getattr(module, name, None)
            if make is None:
                continue
            # Not from a stock of ours: that is for the children.
            plain = make.__wrapped__ if _stock_of(make) else make

            def record(
                *args: Any, _make: Any = plain, _key: Any = (module_name, name), **kwargs: Any
            ) -> Any:
                if args:
                    return _make(*args, **kwargs)
                recorded.setdefault(_key, []).append(kwargs)
                for key, made_for, context in made:
                    if reuse and (key, made_for) == (_key, kwargs):
                        return context
                context = _make(**kwargs)
                made.append((_key, kwargs, context))
                return context

            setattr(module, name, record)
            undo.callback(setattr, module, name, make)
        yield recorded


def _stock_tls_contexts(recorded: _Recorded) -> None:
    """Make contexts ahead for the recorded calls.

    Every context is handed out once, so no two clients share one, and children have copies of
    their own: what a caller does to its context is as private as if it had just been made. The
    stock keeps a hold on them: to free one, with its hundred certificates, would cost a child more
    page faults than a whole model call.
    """
    for (module_name, name), calls in recorded.items():
        module = sys.modules[module_name]
        needed: list[dict[str, Any]] = []
        for kwargs in calls:
            # As many alike as one client has asked for.
            if needed.count(kwargs) * NUM_WARM_CLIENTS < calls.count(kwargs):
                needed.append(kwargs)
        make = getattr(module, name)
        stock = _stock_of(make)
        if not stock:
            setattr(module, name, _stocked(make, needed))
            continue
        new = [kwargs for kwargs in needed if all(kwargs != made_for for made_for, _ in stock)]
        stock += _contexts(make.__wrapped__, new)


def _stock_of(make: Callable[..., Any]) -> list[tuple[dict[str, Any], Any]]:
    """What `_stocked` hands out; empty for a factory that it did not make."""
    stock: list[tuple[dict[str, Any], Any]] = getattr(make, "sandbox_stock", [])
    return stock


def _contexts(
    make: Callable[..., Any], calls: list[dict[str, Any]]
) -> list[tuple[dict[str, Any], Any]]:
    return [(kwargs, make(**kwargs)) for kwargs in calls for _ in range(NUM_TLS_CONTEXTS)]


def _stocked(make: Callable[..., Any], calls: list[dict[str, Any]]) -> Callable[..., Any]:
    certificates = _certificate_variables()
    stock = _contexts(make, calls)
    handed_out = []

    @functools.wraps(make)
    def from_stock(*args: Any, **kwargs: Any) -> Any:
        if not args and _certificate_variables() == certificates:
            for index, (made_for, context) in enumerate(stock):
                if made_for == kwargs:
                    handed_out.append(context)
                    del stock[index]
                    return context
        return make(*args, **kwargs)

    from_stock.sandbox_stock = stock  # type: ignore[attr-defined]
    return from_stock


def _certificate_variables() -> tuple[str | None, str | None]:
    """Where OpenSSL and the SDKs look for authorities: contexts made under others do not fit."""
    return os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
