"""Tiny random models on disk, and the engine: as a decode thread here, or as its real process."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from areal_sub.engine_client import EngineClient
from areal_sub.engines.embedded.decoder import Decoder, Limits, Progress
from areal_sub.engines.embedded.grammars import Constraint
from areal_sub.engines.embedded.request import Request
from areal_sub.engines.embedded.runner import Runner, check_runner
from areal_sub.records import GenerateChunk, GenerateRequest, int32

VOCAB = 97
# Long enough for a request to be caught in the middle, however busy the machine is.
MAX_MODEL_LEN = 2048
DEADLINE_S = 60.0

T = TypeVar("T")

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": MAX_MODEL_LEN,
    # Far from the usual 0.02, so that what is attended to decides which token comes next.
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(
        **SMALL, num_key_value_heads=4, tie_word_embeddings=True
    ),
    "llama-gqa": lambda: transformers.LlamaConfig(
        **SMALL, num_key_value_heads=2, tie_word_embeddings=False
    ),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL, num_key_value_heads=2),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **SMALL, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4, n_positions=MAX_MODEL_LEN,
        initializer_range=0.2, bos_token_id=None, eos_token_id=None,
    ),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**SMALL),
}  # fmt: skip


def make_model(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
    return model.eval().requires_grad_(False)


def prompt_of(length: int, salt: int = 0) -> list[int]:
    return [(i * i + 7 * salt + 3 * i) % VOCAB for i in range(length)]


def greedy_reference(model: Any, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What transformers' own `generate` gives."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_tokens
    )
    return out[0, len(prompt) :].tolist()


def request_of(prompt: Sequence[int], **fields: Any) -> GenerateRequest:
    return GenerateRequest(
        prompt_token_ids=int32(prompt),
        **{"max_new_tokens": 10, "temperature": 0.0, **fields},
    )


class LocalDecoder(Decoder):
    """A decode thread in this process, whose results can be waited for by request."""

    def __init__(self, model: Any, **limits: int) -> None:
        self.results: dict[int, list[Progress]] = {}
        self._changed = threading.Condition()
        self._num_submitted = 0
        self._acts: dict[int, tuple[int, Callable[[], object]]] = {}
        runner = Runner(model)
        check_runner(runner)
        settings = {
            "max_model_len": MAX_MODEL_LEN,
            "max_running_requests": 8,
            "max_prefill_tokens": 1024,
            "max_kv_tokens": 10**6,
            "max_prefix_bytes": 2**24,
        }
        super().__init__(
            runner,
            Limits(**{**settings, **limits}),
            seed=1,
            policy_version=0,
            deliver=self._on_progress,
        )

    def _on_progress(self, steps: list[Progress]) -> None:
        with self._changed:
            for progress in steps:
                parts = self.results.setdefault(progress.request_id, [])
                parts.append(progress)
                num_tokens, act = self._acts.get(progress.request_id, (0, None))
                if act is not None and sum(len(p.token_ids) for p in parts) >= num_tokens:
                    del self._acts[progress.request_id]
                    act()
            self._changed.notify_all()

    def send(
        self,
        record: GenerateRequest,
        *,
        at: int = 0,
        act: Callable[[], object] | None = None,
        constraint: Constraint | None = None,
    ) -> int:
        """Submit; once it has `at` tokens, call `act` on the decode thread, between two steps."""
        request = Request.checked(
            record,
            request_id=self._num_submitted,
            vocab_size=VOCAB,
            max_model_len=self._limits.max_model_len,
        )
        request.constraint = constraint
        self._num_submitted += 1
        if act is not None:
            self._acts[request.request_id] = (at, act)
        self.submit(request)
        return request.request_id

    def wait(self, request_id: int) -> Progress:
        """Until the request ended; all of it as one."""

        def collected() -> Progress:
            parts = self.results.get(request_id, [])
            return Progress(
                request_id,
                [t for p in parts for t in p.token_ids],
                [x for p in parts for x in p.logprobs],
                [v for p in parts for v in p.versions],
                parts[-1].finish_reason if parts else None,
                parts[-1].error if parts else "",
            )

        def enough() -> bool:
            now = collected()
            if self.ended.done():
                self.ended.result()
            return now.finish_reason is not None or bool(now.error)

        with self._changed:
            assert self._changed.wait_for(enough, DEADLINE_S), f"request {request_id} did not end"
            return collected()


@dataclass
class EngineProcess:
    """The real process, and the real client."""

    socket_path: Path
    process: subprocess.Popen[bytes]

    def run(
        self, work: Callable[[EngineClient], Awaitable[T]], deadline_s: float = DEADLINE_S
    ) -> T:
        async def main() -> T:
            client = await EngineClient.connect(self.socket_path, timeout_s=deadline_s)
            try:
                async with asyncio.timeout(deadline_s):
                    return await work(client)
            finally:
                await client.close()

        return asyncio.run(main())


@contextmanager
def engine_process(
    folder: Path, engine: str = "embedded", **settings: Any
) -> Iterator[EngineProcess]:
    socket_path = folder / "engine.sock"
    own = {"device": "cpu"} if engine == "embedded" else {}
    data = {"socket_path": str(socket_path), "seed": 1, **own, **settings}
    settings_path = folder / "settings.json"
    settings_path.write_text(json.dumps(data))
    with (folder / "log").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", f"areal_sub.engines.{engine}", str(settings_path)],
            stdin=subprocess.PIPE,
            stderr=output,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            cwd=Path(__file__).parents[2],
        )
        try:
            yield EngineProcess(socket_path, process)
        finally:
            assert process.stdin is not None
            process.stdin.close()  # how the trainer's end looks from here
            try:
                process.wait(20.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise


async def generate(client: EngineClient, request: GenerateRequest) -> list[GenerateChunk]:
    return [chunk async for chunk in client.generate(request)]


def joined(chunks: Sequence[GenerateChunk], field: str) -> list[Any]:
    return [value for chunk in chunks for value in getattr(chunk, field).tolist()]
