"""SGLang's native HTTP API over a tiny model. What it reads and answers is what its source says
(0.5.23: `srt/entrypoints/http_server.py`, `srt/managers/`); how it computes is not.

It runs in a thread of the test's process and listens on a port of its own.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from aiohttp import web
from safetensors.torch import load_file

MODEL_INFO = {
    "model_path": "/models/tiny",
    "served_model_name": "tiny",
    "is_generation": True,
    "preferred_sampling_params": None,
    "load_format": "auto",
}
SERVER_INFO = {
    "version": "0.5.23",
    "dtype": "float32",
    "max_running_requests": 16,
    "max_total_num_tokens": 4096,
    "max_req_input_len": 1024,
}


@dataclass(eq=False)
class Running:
    """One request."""

    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    events: list[tuple[str, int]] = field(default_factory=list)  # version that ended, at token


@dataclass
class SglangServer:
    model: Any
    incremental: bool = False  # --incremental-streaming-output
    original_logprobs: bool = False  # SGLANG_RETURN_ORIGINAL_LOGPROB
    hold_at: int | None = None  # requests wait at this token until there are new weights
    info: dict[str, Any] = field(default_factory=dict)
    server_info: dict[str, Any] = field(default_factory=dict)
    leave_out: tuple[str, ...] = ()  # keys of answers that an older release has not got
    weight_version: str = "default"
    paused_modes: list[str] = field(default_factory=list)
    salts: list[str] = field(default_factory=list)
    url: str = ""

    def __post_init__(self) -> None:
        self.running: set[Running] = set()
        self._generator = torch.Generator().manual_seed(3)

    async def serve(self, ready: threading.Event, ended: asyncio.Event) -> None:
        self._go, self._updated = asyncio.Event(), asyncio.Event()
        self._go.set()
        app = web.Application()
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/server_info", self._server_info)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/pause_generation", self._pause)
        app.router.add_post("/continue_generation", self._continue)
        app.router.add_post("/update_weights_from_disk", self._update)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await ended.wait()
        await runner.cleanup()

    async def _model_info(self, request: web.Request) -> web.Response:
        info = {**MODEL_INFO, "weight_version": self.weight_version, **self.info}
        return web.json_response(info)

    async def _server_info(self, request: web.Request) -> web.Response:
        return web.json_response({**SERVER_INFO, **self.server_info})

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny"}]})

    async def _pause(self, request: web.Request) -> web.Response:
        self.paused_modes.append((await request.json()).get("mode", "abort"))
        self._go.clear()
        return web.json_response({"status": "ok"})

    async def _continue(self, request: web.Request) -> web.Response:
        await request.json()  # a body is required
        self._go.set()
        return web.json_response({"status": "ok"})

    async def _update(self, request: web.Request) -> web.Response:
        body = await request.json()
        assert not self._go.is_set(), "it would wait for the running requests"
        if body.get("flush_cache", True) and self.running:
            answer = {"success": False, "message": "the cache cannot be flushed"}
            return web.json_response(answer, status=400)
        tensors = load_file(f"{body['model_path']}/model.safetensors")
        if set(tensors) - set(self.model.state_dict()):
            return web.json_response({"success": False, "message": "no such tensor"}, status=400)
        self.model.load_state_dict(tensors, strict=False)
        for each in self.running:
            if each.output_ids:
                each.events.append((self.weight_version, len(each.output_ids)))
        self.weight_version = body["weight_version"]
        self._updated.set()
        return web.json_response({"success": True, "message": "", "num_paused_requests": 0})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        unknown = set(body) - {
            *("input_ids", "sampling_params", "return_logprob", "logprob_start_len", "stream"),
            *("return_prompt_token_ids", "cache_salt"),
        }
        if unknown:
            return web.json_response({"error": {"message": f"unknown: {unknown}"}}, status=400)
        self.salts.append(body["cache_salt"])
        each = Running()
        self.running.add(each)
        try:
            if not body.get("stream"):
                events = [event async for event in self._sample(body, each)]
                return web.json_response(events[-1])
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            async for event in self._sample(body, each):
                await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            await response.write(b"data: [DONE]\n\n")
            return response
        finally:
            self.running.discard(each)

    async def _sample(self, body: dict[str, Any], each: Running) -> Any:
        ids, params = list(body["input_ids"]), body["sampling_params"]
        prompt_scores = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        began_with = self.weight_version
        finish: dict[str, Any] | None = None
        num_sent = 0
        while finish is None:
            await asyncio.sleep(0)
            while self.hold_at == len(each.output_ids) and self.weight_version == began_with:
                self._updated.clear()
                await self._updated.wait()
            await self._go.wait()
            token_id, logprob = self._next([*ids, *each.output_ids], params)
            each.output_ids.append(token_id)
            each.logprobs.append(logprob)
            if token_id in params.get("stop_token_ids", []) and not params.get("ignore_eos"):
                finish = {"type": "stop", "matched": token_id}
            elif len(each.output_ids) == params["max_new_tokens"]:
                finish = {"type": "length", "length": params["max_new_tokens"]}
            start = num_sent if self.incremental and body.get("stream") else 0
            meta: dict[str, Any] = {
                "id": "r",
                "finish_reason": finish,
                "prompt_tokens": len(ids),
                "completion_tokens": len(each.output_ids),
                "weight_version": self.weight_version,
            }
            if body.get("return_logprob"):
                pairs = list(zip(each.logprobs, each.output_ids, strict=True))[start:]
                meta["output_token_logprobs"] = [[*pair, None] for pair in pairs]
            if body.get("logprob_start_len") == 0:
                scores = [float(prompt_scores[i, t]) for i, t in enumerate(ids[1:])]
                entries = zip([None, *scores], ids, strict=True)
                meta["input_token_logprobs"] = [[*entry, None] for entry in entries]
            if finish is not None:
                meta["weight_versions"] = self._spans(each)
            answer = {"text": "", "output_ids": each.output_ids[start:], "meta_info": meta}
            if body.get("return_prompt_token_ids"):
                answer["prompt_token_ids"] = ids
            for key in self.leave_out:
                answer.pop(key, None), meta.pop(key, None)
            num_sent = len(each.output_ids)
            yield answer

    def _next(self, ids: list[int], params: dict[str, Any]) -> tuple[int, float]:
        logits = self.model(torch.tensor([ids])).logits[0, -1]
        plain = logits.log_softmax(-1)
        if params["temperature"] == 0:
            token_id = int(logits.argmax())
            return token_id, float(plain[token_id])
        scaled = (logits / params["temperature"]).log_softmax(-1)
        token_id = int(torch.multinomial(scaled.exp(), 1, generator=self._generator))
        return token_id, float((plain if self.original_logprobs else scaled)[token_id])

    def _spans(self, each: Running) -> list[dict[str, Any]]:
        spans: list[dict[str, Any]] = []
        for version, end in [*each.events, (self.weight_version, len(each.output_ids))]:
            start = spans[-1]["end"] if spans else 0
            if end > start:
                spans.append({"version": version, "start": start, "end": end})
        return spans


@contextmanager
def serving(server: SglangServer) -> Iterator[SglangServer]:
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    ended = asyncio.Event()

    def run() -> None:
        with torch.inference_mode():
            loop.run_until_complete(server.serve(ready, ended))
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(20.0), "the server did not start"
        yield server
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(20.0)
