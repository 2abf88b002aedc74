"""A small real model folder, an engine stub behind a real socket, and the proxy on real ports."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from google import genai
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from areal_sub.proxy.render import Renderer
from areal_sub.proxy.server import Settings, serving
from areal_sub.proxy.vocabulary import Vocabulary
from areal_sub.records import (
    EngineInfo,
    GenerateChunk,
    GenerateRequest,
    IntentRecord,
    TrajectoryRecord,
    TurnRecord,
    decode_record,
    float32,
    int32,
)
from areal_sub.rpc import Client, Server
from areal_sub.trajectory.journal import read_journal
from areal_sub.trajectory.tree import Trajectory

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NOT_SPECIAL = ["<tool_call>", "</tool_call>", "<think>", "</think>"]

# Qwen2.5's, less its default system prompt.
TEMPLATE = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- endif %}
    {{- "\n\n# Tools\n\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- generation %}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {{- '\n<tool_call>\n{"name": "' + tool_call.function.name + '", "arguments": ' }}
            {{- tool_call.function.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

# As Qwen3: what was thought before the last user message is left out.
THINKING_TEMPLATE = r"""
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and loop.index0 < ns.last and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

CORPUS = [
    "What is 7 * 8? The answer is 56. Hello there, how are you today?",
    'system user assistant tool {"name": "calc", "arguments": {"a": 1, "b": 2}}',
    "You are a helpful assistant. You may call functions to help with the user's query.",
]


def make_model_folder(folder: Path, template: str = TEMPLATE) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in NOT_SPECIAL])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "bos_token": None, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(template)
    eos = tokenizer.token_to_id("<|endoftext|>")
    (folder / "config.json").write_text(json.dumps({"eos_token_id": eos}))
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def thinking_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("thinking"), THINKING_TEMPLATE)


@pytest.fixture(scope="session")
def vocabulary(model_folder: Path) -> Vocabulary:
    return Vocabulary(model_folder)


@dataclass
class StubEngine:
    """Serves the engine's methods; says what it is told to, token by token where it streams.

    `reply` gives the text (control tokens meant as such) or the token ids of the next answer.
    `gate`: called before each token; a test makes it wait. What was asked and given is kept.
    """

    vocabulary: Vocabulary
    reply: Callable[[GenerateRequest], str | list[int]] = lambda request: "ok<|im_end|>"
    gate: Callable[[int], Any] | None = None
    max_model_len: int = 4096
    policy_version: int = 0
    requests: list[GenerateRequest] = field(default_factory=list)
    sampled: list[list[int]] = field(default_factory=list)  # as `requests`: what each was given
    num_running: int = 0
    num_aborted: int = 0
    fail: str = ""
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    def says(self, *replies: str | list[int]) -> None:
        """One reply per request, the last one for ever."""
        remaining = list(replies)
        self.reply = lambda request: remaining.pop(0) if len(remaining) > 1 else remaining[0]

    async def info(self, params: dict[str, Any]) -> dict[str, Any]:
        return EngineInfo(
            policy_version=self.policy_version,
            max_model_len=self.max_model_len,
            vocab_size=1000,
            num_slots=8,
            num_running=self.num_running,
            num_waiting=0,
            num_generated_tokens=0,
            num_decode_steps=0,
        ).to_map()

    async def generate(self, params: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        request = GenerateRequest.from_map(params)
        if self.fail:
            raise RuntimeError(self.fail)
        reply = self.reply(request)
        ids = self.vocabulary.encode(reply) if isinstance(reply, str) else list(reply)
        cut = ids[: request.max_new_tokens]
        stopped = bool(cut) and cut[-1] in request.stop_token_ids
        given: list[int] = []
        self.requests.append(request)
        self.sampled.append(given)
        self.num_running += 1
        finished = False
        try:
            step = 1 if request.stream else len(cut)
            for start in range(0, len(cut), step):
                if self.gate is not None:
                    await self.gate(start)
                part = cut[start : start + step]
                given += part
                is_last = start + step >= len(cut)
                finished = is_last
                yield GenerateChunk(
                    token_ids=int32(part),
                    logprobs=float32([-0.5 - token_id / 1000 for token_id in part]),
                    versions=int32([self.policy_version] * len(part)),
                    finish_reason=("stop" if stopped else "length") if is_last else None,
                ).to_map()
        finally:
            self.num_running -= 1
            self.num_aborted += not finished
            async with self.changed:
                self.changed.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10), self.changed:
            await self.changed.wait_for(condition)


@dataclass
class Proxy:
    """A running proxy and what a test needs to talk to it from both sides."""

    engine: StubEngine
    control: Client
    port: int
    journal_path: Path
    engine_server: Server
    ids: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def open(self, **changes: Any) -> Rollout:
        """Open a rollout. `changes`: of its parameters or of its `gconfig`."""
        rollout_id = changes.pop("rollout_id", f"r{next(self.ids)}")
        gconfig = {
            "max_new_tokens": 256,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "override_agent": True,
        }
        gconfig |= {name: changes.pop(name) for name in list(changes) if name in gconfig}
        params = {
            "rollout_id": rollout_id,
            "key": secrets.token_urlsafe(24),
            "group_id": "g0",
            "task_id": "t0",
            "split": "train",
            "policy_version": 0,
            "max_turns": 64,
            "gconfig": gconfig,
        } | changes
        await self.control.call("open_rollout", params, timeout_s=10)
        return Rollout(self, rollout_id, params["key"])

    async def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = await self.control.call("stats", timeout_s=10)
        return stats

    def records(self) -> list[TrajectoryRecord]:
        return [decode_record(raw) for _, raw in read_journal(self.journal_path)]


@dataclass
class Rollout:
    proxy: Proxy
    rollout_id: str
    key: str

    @property
    def base_url(self) -> str:
        return f"{self.proxy.url}/v1"

    def client(self, **changes: Any) -> openai.AsyncOpenAI:
        settings = {"base_url": self.base_url, "api_key": self.key, "max_retries": 0, "timeout": 20}
        return openai.AsyncOpenAI(**{**settings, **changes})

    def anthropic(self, **changes: Any) -> anthropic.AsyncAnthropic:
        settings = {"base_url": self.proxy.url, "api_key": self.key, "max_retries": 0}
        return anthropic.AsyncAnthropic(**{**settings, "timeout": 20, **changes})

    def gemini(self, api_key: str | None = None, **options: Any) -> genai.client.AsyncClient:
        options = {"base_url": self.proxy.url, "timeout": 20_000, **options}
        return genai.Client(api_key=api_key or self.key, http_options=options).aio

    async def end(self, **changes: Any) -> dict[str, Any]:
        params = {
            "rollout_id": self.rollout_id,
            "outcome": "completed",
            "reward": 1.0,
            "turn_rewards": {},
            "error": "",
            "traceback": "",
            "stdout_tail": "",
            "stderr_tail": "",
            "wall_s": 1.0,
            "cpu_s": 0.5,
            "max_rss_bytes": 1000,
            "egress_refused": {},
            "written_bytes": 4096,
            "peak_memory_bytes": 8192,
        } | changes
        ended: dict[str, Any] = await self.proxy.control.call("end_rollout", params, timeout_s=10)
        return ended

    def turns(self) -> list[TurnRecord]:
        return [
            record
            for record in self.proxy.records()
            if isinstance(record, TurnRecord) and record.rollout_id == self.rollout_id
        ]

    def trajectory(self) -> Trajectory:
        opened, *turns, end = [
            record
            for record in self.proxy.records()
            if record.rollout_id == self.rollout_id and not isinstance(record, IntentRecord)
        ]
        return Trajectory.build(opened, turns, end)  # type: ignore[arg-type]


def proxy_settings(folder: Path, engine_path: Path, model: Path, **changes: Any) -> dict[str, Any]:
    return {
        "agent_host": "127.0.0.1",
        "agent_port": 0,
        "control_path": str(folder / "proxy.sock"),
        "listeners_path": str(folder / "listeners.sock"),
        "engine_path": str(engine_path),
        "journal_path": str(folder / "journal.bin"),
        "tokenizer_path": str(model),
        "chat_template": None,
        "tool_call_parser": "auto",
        "reasoning_parser": "none",
        "request_timeout_s": 20.0,
    } | changes


@asynccontextmanager
async def running_engine(folder: Path, model: Path) -> AsyncIterator[tuple[StubEngine, Server]]:
    engine = StubEngine(Vocabulary(model))
    handlers = {"info": engine.info, "generate": engine.generate}
    server = Server(folder / "engine.sock", handlers)
    await server.start()
    try:
        yield engine, server
    finally:
        await server.close()


@asynccontextmanager
async def running_proxy(
    folder: Path, model: Path, max_model_len: int = 4096, **changes: Any
) -> AsyncIterator[Proxy]:
    """The proxy in this process, on real sockets."""
    async with running_engine(folder, model) as (engine, server):
        engine.max_model_len = max_model_len
        settings = proxy_settings(folder, folder / "engine.sock", model, **changes)
        async with running_proxy_of(engine, server, settings) as proxy:
            yield proxy


@asynccontextmanager
async def running_proxy_of(
    engine: Any, server: Any, settings: dict[str, Any]
) -> AsyncIterator[Proxy]:
    async with AsyncExitStack() as cleanup:
        await cleanup.enter_async_context(serving(Settings(**settings)))
        control = await Client.connect(Path(settings["control_path"]), peer="proxy", timeout_s=10)
        cleanup.push_async_callback(control.close)
        port = (await control.call("info", timeout_s=10))["agent_port"]
        yield Proxy(engine, control, port, Path(settings["journal_path"]), server)


@pytest.fixture(scope="module")
def with_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """`with_engine(work, **changes)`: as `proxied`, before a real embedded engine with a random
    model (one for the whole module)."""
    from engine_lab import engine_process
    from grammar_lab import make_folder

    model = tmp_path_factory.mktemp("random")
    make_folder(model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    with engine_process(model, model_path=str(model), max_running_requests=8) as engine:

        def run(work: Callable[[Proxy], Any], **changes: Any) -> Any:
            async def main() -> Any:
                folder = tmp_path_factory.mktemp("proxy")
                settings = proxy_settings(folder, engine.socket_path, model, **changes)
                async with (
                    running_proxy_of(engine, None, settings) as proxy,
                    asyncio.timeout(60),
                ):
                    return await work(proxy)

            return asyncio.run(main())

        yield run


@pytest.fixture
def proxied(tmp_path: Path, model_folder: Path) -> Callable[..., Any]:
    """`proxied(work, **changes)`: run `await work(proxy)` with a proxy of its own."""

    def run(work: Callable[[Proxy], Any], model: Path = model_folder, **changes: Any) -> Any:
        async def main() -> Any:
            async with running_proxy(tmp_path, model, **changes) as proxy, asyncio.timeout(30):
                return await work(proxy)

        return asyncio.run(main())

    return run


@pytest.fixture(scope="session")
def new_stub() -> type[StubEngine]:
    return StubEngine


@pytest.fixture(scope="session")
def renderers(model_folder: Path, thinking_folder: Path) -> dict[str, Any]:
    """One for each template, and one that tells reasoning apart."""
    return {
        "plain": Renderer.load(model_folder),
        "thinking": Renderer.load(thinking_folder),
        "reasoning": Renderer.load(model_folder, reasoning_parser="think"),
    }


@pytest.fixture
def engine_alone(tmp_path: Path, model_folder: Path) -> Callable[..., Any]:
    """An engine stub, and the settings with which a proxy process finds it."""

    @asynccontextmanager
    async def start(**changes: Any) -> AsyncIterator[tuple[StubEngine, dict[str, Any]]]:
        async with running_engine(tmp_path, model_folder) as (engine, _):
            yield (
                engine,
                proxy_settings(tmp_path, tmp_path / "engine.sock", model_folder, **changes),
            )

    return start
