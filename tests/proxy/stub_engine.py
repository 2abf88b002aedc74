"""A small real model folder, and an engine stub that answers as it is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from areal_sub.engine_client import item_of
from areal_sub.proxy.vocabulary import Vocabulary
from areal_sub.records import EngineInfo, GenerateChunk, GenerateRequest, float32, int32

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

    async def generate(self, params: dict[str, Any]) -> AsyncIterator[Any]:
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
                chunk = GenerateChunk(
                    token_ids=int32(part),
                    logprobs=float32([-0.5 - token_id / 1000 for token_id in part]),
                    versions=int32([self.policy_version] * len(part)),
                    finish_reason=("stop" if stopped else "length") if is_last else None,
                )
                yield item_of(chunk)
        finally:
            self.num_running -= 1
            self.num_aborted += not finished
            async with self.changed:
                self.changed.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10), self.changed:
            await self.changed.wait_for(condition)
