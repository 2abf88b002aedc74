"""Seconds that new weights take into a running engine, against a plain copy of as many bytes.

    make bench-weights ARGS="--model runs/policies/smollm2-135m"

Per round, in turns: a copy from memory to memory on one thread of this process (what the memory
gives), then for each engine the learner's file in /dev/shm is put into it (`update_weights`), while
it is idle and while it samples. What it costs the learner to write the file stands beside them.
Printed: medians of wall and CPU time of whoever works, and ratios to the copy of the same round.
CPU time is what other load on the machine disturbs less; while an engine samples, that is in it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
import transformers

from areal_sub.learner.weights_file import leave, write_weights
from areal_sub.records import GenerateRequest, int32
from benchmarks.engine import OverContract, cpu_of, make_tiny, start

UPDATE_S = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny", help="'tiny', or a Hugging Face folder")
    parser.add_argument("--engines", nargs="+", default=["embedded", "vllm"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num-threads", type=int)
    parser.add_argument("--vllm-python", default=os.environ.get("AREAL_SUB_VLLM_PYTHON"))
    args = parser.parse_args()
    args.num_prompt, args.num_tokens, args.at_once = 32, 256, [16]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="as-")))
        shared = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        model_path = folder / "tiny" if args.model == "tiny" else Path(args.model).resolve()
        if args.model == "tiny":
            make_tiny(model_path)
        engines = {}
        for name in args.engines:
            engines[name] = stack.enter_context(start(name, model_path, folder, args))
        transformers.utils.logging.disable_progress_bar()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            model_path, dtype=getattr(torch, args.dtype)
        )
        weights = {name: p.data for name, p in model.named_parameters()}
        targets = [torch.zeros_like(tensor) for tensor in weights.values()]
        num_bytes = sum(t.nbytes for t in targets)
        torch.set_num_threads(1)
        seconds: dict[str, list[tuple[float, float]]] = {}

        def seen(what: str, act: Callable[[], object], cpu: Callable[[], float]) -> None:
            cpu_s, started_at = cpu(), time.perf_counter()
            act()
            taken = (time.perf_counter() - started_at, cpu() - cpu_s)
            seconds.setdefault(what, []).append(taken)

        def copy() -> None:
            for target, source in zip(targets, weights.values(), strict=True):
                target.copy_(source)

        for number in range(args.rounds + 1):
            seen("plain copy", copy, time.process_time)
            path = shared / f"v{number}.safetensors"
            write = partial(write_weights, path, weights, {})
            seen("written by the learner", write, time.process_time)
            for name, engine in engines.items():
                assert isinstance(engine, OverContract)
                update = Update(engine, path, 2 * number + 1)
                cpu = partial(cpu_of, engine.process)
                seen(f"{name}, idle", update.idle, cpu)
                seen(f"{name}, sampling", update.sampling, cpu)
                update.until_idle()
            leave(path)
    copies = seconds["plain copy"][1:]
    print(f"{args.model}, {args.dtype}: {num_bytes / 2**20:.1f} MiB, {args.rounds} rounds")
    print(f"{'':<24} {'wall ms':>9} {'GB/s':>6} {'ratio':>6} {'CPU ms':>9} {'ratio':>6}")
    for what, taken in seconds.items():
        row = f"{what:<24}"
        for kind in (0, 1):
            ratio = statistics.median(
                t[kind] / c[kind] for t, c in zip(taken[1:], copies, strict=True)
            )
            median_s = statistics.median(t[kind] for t in taken[1:])
            rate = f" {num_bytes / median_s / 1e9:6.2f}" if kind == 0 else ""
            row += f" {median_s * 1e3:9.1f}{rate} {ratio:6.2f}"
        print(row)


class Update:
    def __init__(self, engine: OverContract, path: Path, version: int) -> None:
        self._engine, self._path, self._version = engine, path, version

    def idle(self) -> None:
        self._put(self._version)

    def sampling(self) -> None:
        """Its time begins and ends with requests in flight, which go on."""
        engine = self._engine

        async def one() -> None:
            request = GenerateRequest(
                prompt_token_ids=int32(range(5, 37)), max_new_tokens=200, temperature=1.0
            )
            async for _ in engine.client.generate(request):
                pass

        calls = [engine.loop.create_task(one()) for _ in range(8)]
        self._put(self._version + 1)
        for call in calls:
            call.cancel()
        engine.loop.run_until_complete(asyncio.gather(*calls, return_exceptions=True))

    def until_idle(self) -> None:
        """What it was sampling is not done with when the calls are cancelled."""
        engine = self._engine
        deadline = time.monotonic() + UPDATE_S
        while engine.loop.run_until_complete(engine.client.info()).num_running:
            if time.monotonic() > deadline:
                raise SystemExit(f"an engine still samples after {UPDATE_S:g} s")

    def _put(self, version: int) -> None:
        self._engine.loop.run_until_complete(
            self._engine.client.update_weights(self._path, version, timeout_s=UPDATE_S)
        )


if __name__ == "__main__":
    main()
