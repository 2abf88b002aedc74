"""The engine's process: loads the model, starts the decode thread, serves `engine_client`'s calls.

Everything here runs on the asyncio thread. A call waits for its own request's progress; when its
caller goes away, it takes the request out of the batch. The process ends when its trainer does, or
when the decode thread fails.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from areal_sub.engine_client import item_of
from areal_sub.engines.embedded import weights
from areal_sub.engines.embedded.decoder import Decoder, Limits, Progress
from areal_sub.engines.embedded.grammars import Grammars
from areal_sub.engines.embedded.request import Request, RequestError
from areal_sub.engines.embedded.runner import Runner, check_runner
from areal_sub.engines.embedded.settings import EngineSettings
from areal_sub.errors import ModelError
from areal_sub.records import (
    EngineInfo,
    GenerateChunk,
    GenerateRequest,
    Int32Array,
    extend_digest,
    float32,
    int32,
    uint32,
)
from areal_sub.rpc import Server

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 3.0

T = TypeVar("T")


async def serve(data: dict[str, Any]) -> None:
    """Serve until cancelled. `data`: see `EngineSettings`. Raises `ConfigError`, `ModelError`."""
    settings = EngineSettings.from_map(data)
    config = weights.load_config(settings.model_path)
    max_model_len = weights.served_model_len(config, settings.max_model_len)
    runner = await _on_thread(lambda: load_runner(settings))
    limits = limits_of(settings, runner, max_model_len)
    await Engine(settings, runner, limits).serve()


class Engine:
    def __init__(self, settings: EngineSettings, runner: Runner, limits: Limits) -> None:
        self._socket_path = settings.socket_path
        self._limits = limits
        self._vocab_size = runner.vocab_size
        self._names = weights.WeightNames.of(runner.model)
        self._ids = itertools.count()
        self._calls: dict[int, _Call] = {}
        self._grammars = Grammars(
            settings.tokenizer_path or settings.model_path,
            vocab_size=runner.vocab_size,
            max_open=limits.max_running_requests,
        )
        self._updating = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._decoder = Decoder(
            runner,
            limits,
            seed=settings.seed,
            policy_version=settings.policy_version,
            deliver=lambda steps: self._loop.call_soon_threadsafe(self._deliver, steps),
        )

    async def serve(self) -> None:
        server = Server(
            self._socket_path,
            {
                "info": self._info,
                "generate": self._generate,
                "update_weights": self._update_weights,
                "pause": self._pause,
                "resume": self._resume,
            },
        )
        self._decoder.start()
        try:
            await server.start()
            await asyncio.wrap_future(self._decoder.ended)
        finally:
            await server.close()
            self._decoder.stop(STOP_TIMEOUT_S)
            self._grammars.close()

    async def _info(self, params: dict[str, Any]) -> dict[str, Any]:
        decoder = self._decoder
        return EngineInfo(
            policy_version=decoder.policy_version,
            max_model_len=self._limits.max_model_len,
            vocab_size=self._vocab_size,
            num_slots=self._limits.max_running_requests,
            num_running=decoder.num_running,
            num_waiting=decoder.num_waiting,
            num_generated_tokens=decoder.num_generated_tokens,
            num_decode_steps=decoder.num_decode_steps,
        ).to_map()

    async def _generate(self, params: dict[str, Any]) -> AsyncIterator[Any]:
        record = GenerateRequest.from_map(params)
        request = Request.checked(
            record,
            request_id=next(self._ids),
            vocab_size=self._vocab_size,
            max_model_len=self._limits.max_model_len,
        )
        if request.grammar:
            request.constraint = await self._grammars.compile(
                request.grammar, stop_token_ids=request.stop_token_ids
            )
        call = self._calls[request.request_id] = _Call(extend_digest(0, request.prompt))
        self._decoder.submit(request)
        try:
            while True:
                chunk = await call.next_chunk()
                yield item_of(chunk)
                if chunk.finish_reason is not None:
                    return
        finally:
            del self._calls[request.request_id]
            if not call.ended:
                self._decoder.abort(request.request_id)

    async def _update_weights(self, params: dict[str, Any]) -> None:
        """Versions only grow: a version that came twice would be two sets of weights."""
        async with self._updating:
            path, version = Path(params["path"]), params["version"]
            current = self._decoder.policy_version
            if type(version) is not int or version <= current:
                raise ModelError(
                    f"update_weights to version {version!r}: the engine is at {current}, and "
                    "versions must grow with each update"
                )
            update = await _on_thread(lambda: weights.read_update(path, self._names))
            await asyncio.wrap_future(self._decoder.update(update, version))
            log.info("policy version %d in force", version)

    async def _pause(self, params: dict[str, Any]) -> None:
        await asyncio.wrap_future(self._decoder.pause())

    async def _resume(self, params: dict[str, Any]) -> None:
        await asyncio.wrap_future(self._decoder.resume())

    def _deliver(self, steps: list[Progress]) -> None:
        for progress in steps:
            if (call := self._calls.get(progress.request_id)) is not None:
                call.add(progress)


class _Call:
    """What has been sampled for one `generate` call and not been sent yet.

    A slow reader gets fewer, longer chunks, so what waits here is bounded by the request itself.
    """

    def __init__(self, prompt_digest: int) -> None:
        self.ended = False
        self._digest = prompt_digest
        self._changed = asyncio.Event()
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []
        self._finish_reason: str | None = None
        self._error = ""

    def add(self, progress: Progress) -> None:
        self._token_ids += progress.token_ids
        self._logprobs += progress.logprobs
        self._versions += progress.versions
        self._finish_reason = progress.finish_reason
        self._error = progress.error
        self.ended = bool(progress.error) or progress.finish_reason is not None
        self._changed.set()

    async def next_chunk(self) -> GenerateChunk:
        """Waits for the decode thread; the deadline is the caller's. Raises `RequestError`."""
        await self._changed.wait()
        self._changed.clear()
        if self._error:
            raise RequestError(self._error)
        token_ids = int32(self._token_ids)
        chunk = GenerateChunk(
            token_ids=token_ids,
            logprobs=float32(self._logprobs),
            versions=int32(self._versions),
            finish_reason=self._finish_reason,
            digests=uint32([self._extended(token_ids[i : i + 1]) for i in range(len(token_ids))]),
        )
        self._token_ids, self._logprobs, self._versions = [], [], []
        return chunk

    def _extended(self, token_ids: Int32Array) -> int:
        self._digest = extend_digest(self._digest, token_ids)
        return self._digest


async def _on_thread(work: Callable[[], T]) -> T:
    """Run `work` beside the loop, on a thread that does not hold up the process's end.

    (`asyncio.to_thread` does: a loop waits for its threads before it closes.)
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    done.set_running_or_notify_cancel()
    threading.Thread(target=run, name="load", daemon=True).start()
    return await asyncio.wrap_future(done)


def load_runner(settings: EngineSettings) -> Runner:
    """Raises `ModelError`."""
    transformers.utils.logging.disable_progress_bar()
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = weights.load_model(
        settings.model_path, dtype=settings.dtype, device=torch.device(device)
    )
    num_parameters = sum(p.numel() for p in model.parameters())
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    elif num_parameters < weights.TINY_NUM_PARAMETERS:
        torch.set_num_threads(1)
    runner = Runner(model)
    check_runner(runner)
    log.info(
        "%s, %.1fM parameters, %s on %s, %d torch threads",
        type(model).__name__,
        num_parameters / 1e6,
        settings.dtype,
        device,
        torch.get_num_threads(),
    )
    return runner


def limits_of(settings: EngineSettings, runner: Runner, max_model_len: int) -> Limits:
    """Raises `ModelError` where not even one sequence of `max_model_len` fits."""
    on_cpu = runner.device.type == "cpu"
    max_kv_bytes = settings.max_kv_bytes or _free_bytes(runner.device) // 2
    bytes_per_token = runner.cache.bytes_per_token()
    max_kv_tokens = max_kv_bytes // bytes_per_token
    if max_kv_tokens < max_model_len:
        raise ModelError(
            f"one sequence of max_model_len {max_model_len} needs "
            f"{max_model_len * bytes_per_token / 2**20:.0f} MiB of keys and values, "
            f"{max_kv_bytes / 2**20:.0f} MiB are there for them: lower engine.max_model_len"
        )
    return Limits(
        max_model_len=max_model_len,
        max_running_requests=settings.max_running_requests,
        max_prefill_tokens=settings.max_prefill_tokens or (1024 if on_cpu else 8192),
        max_kv_tokens=max_kv_tokens,
        max_prefix_bytes=settings.max_prefix_bytes,
    )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ModelError("/proc/meminfo has no MemAvailable: set engine.max_kv_bytes")
