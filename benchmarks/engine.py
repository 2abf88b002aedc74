"""Tokens per second of the embedded engine, of vLLM on the CPU and of transformers' `generate`.

    make bench-engine                                   # the tiny policy's shape
    make bench-engine ARGS="--model runs/policies/smollm2-135m --at-once 1 16 64"

All engines are up at the same time, in processes of their own, and take turns: per concurrency and
round each gets the same requests at once, as many tokens in and out for each of them, sampled at
temperature 1. vLLM and the embedded engine answer the engine contract; `generate` gets the requests
as one batch, which is its best case, as none joins late. Printed per engine: median tokens per
second, and CPU milliseconds per 1,000 tokens of its whole process tree, which other load on the
machine disturbs less; both as ratios to the first engine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil

from areal_sub.engine_client import EngineClient
from areal_sub.records import GenerateRequest, int32

START_S = 900.0
CALL_S = 900.0


class Sampler(Protocol):
    process: subprocess.Popen[bytes]

    def sample(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny", help="'tiny', or a Hugging Face folder")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--engines", nargs="+", default=["embedded", "hf", "vllm"])
    parser.add_argument("--num-prompt", type=int, default=32)
    parser.add_argument("--num-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num-threads", type=int, help="torch's, of embedded and hf")
    parser.add_argument("--vllm-python", default=os.environ.get("AREAL_SUB_VLLM_PYTHON"))
    args = parser.parse_args()
    if "vllm" in args.engines and args.vllm_python is None:
        parser.error("--vllm-python: the interpreter that has vLLM (make bench-engine finds it)")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="as-")))
        model = folder / "tiny" if args.model == "tiny" else Path(args.model).resolve()
        if args.model == "tiny":
            make_tiny(model)
        samplers = {
            name: stack.enter_context(start(name, model, folder, args)) for name in args.engines
        }
        print(
            f"{args.model}, {args.dtype}: {args.num_prompt} tokens in, {args.num_tokens} out per "
            f"request, {args.rounds} rounds"
        )
        print(f"{'at once':>7}  {'engine':<9} {'tokens/s':>9} {'ratio':>6} {'CPU ms/1k':>10} ratio")
        for at_once in args.at_once:
            report(at_once, measure(samplers, at_once, args))


@dataclass
class Seen:
    rates: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)


def measure(samplers: dict[str, Sampler], at_once: int, args: Any) -> dict[str, Seen]:
    seen = {name: Seen() for name in samplers}
    for round_number in range(args.rounds + 1):
        for name, sampler in samplers.items():
            prompts = [
                [(i * (j + 3) + 7 * j + round_number) % 300 + 5 for i in range(args.num_prompt)]
                for j in range(at_once)
            ]
            cpu_s, started_at = cpu_of(sampler.process), time.perf_counter()
            sampler.sample(prompts, args.num_tokens)
            wall_s = time.perf_counter() - started_at
            if round_number:  # the first warms up
                num_tokens = at_once * args.num_tokens
                seen[name].rates.append(num_tokens / wall_s)
                used_s = cpu_of(sampler.process) - cpu_s
                seen[name].cpu_ms.append(used_s * 1e6 / num_tokens)
    return seen


def report(at_once: int, seen: dict[str, Seen]) -> None:
    base = next(iter(seen.values()))
    for name, each in seen.items():
        rate, cpu = statistics.median(each.rates), statistics.median(each.cpu_ms)
        print(
            f"{at_once:>7}  {name:<9} {rate:>9.0f} {rate / statistics.median(base.rates):>6.2f} "
            f"{cpu:>10.0f} {cpu / statistics.median(base.cpu_ms):.2f}",
            flush=True,
        )


def cpu_of(process: subprocess.Popen[bytes]) -> float:
    root = psutil.Process(process.pid)
    times = [p.cpu_times() for p in (root, *root.children(recursive=True))]
    return float(sum(t.user + t.system for t in times))


class OverContract:
    """An engine process of areal-sub."""

    def __init__(self, process: subprocess.Popen[bytes], socket_path: Path) -> None:
        self.process = process
        self.loop = asyncio.new_event_loop()
        self.client = self.loop.run_until_complete(
            EngineClient.connect(socket_path, timeout_s=START_S)
        )

    def close(self) -> None:
        self.loop.run_until_complete(self.client.close())
        self.loop.close()

    def sample(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> None:
        async def one(prompt: Sequence[int]) -> None:
            request = GenerateRequest(
                prompt_token_ids=int32(prompt), max_new_tokens=num_tokens, temperature=1.0
            )
            given = [len(chunk.token_ids) async for chunk in self.client.generate(request)]
            assert sum(given) == num_tokens, given

        async def all_of_them() -> None:
            async with asyncio.timeout(CALL_S):
                await asyncio.gather(*map(one, prompts))

        self.loop.run_until_complete(all_of_them())


class OverPipe:
    """transformers' `generate` in a process of its own (`serve_generate`)."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        assert process.stdout is not None
        process.stdout.readline()

    def sample(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        line = json.dumps({"prompts": prompts, "num_tokens": num_tokens})
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        assert int(self.process.stdout.readline()) == len(prompts) * num_tokens


@contextmanager
def start(name: str, model: Path, folder: Path, args: Any) -> Iterator[Sampler]:
    settings: dict[str, Any] = {
        "socket_path": str(folder / f"{name}.sock"),
        "model_path": str(model),
        "dtype": args.dtype,
        "max_running_requests": max(args.at_once),
        "max_model_len": args.num_prompt + args.num_tokens,
    }
    if name == "vllm":
        if not args.vllm_python:
            raise SystemExit("vllm: --vllm-python names its interpreter; or see --engines")
        settings |= {
            "python": args.vllm_python,
            "args": ["--enforce-eager"],
            "env": {"VLLM_CPU_KVCACHE_SPACE": "2"},
            "start_timeout_s": START_S,
        }
    else:
        settings |= {"num_threads": args.num_threads, "device": "cpu"}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(settings))
    module = ["benchmarks.engine", "hf"] if name == "hf" else [f"areal_sub.engines.{name}"]
    command = [sys.executable, "-m", module[0], *module[1:], str(path)]
    with (folder / f"{name}.log").open("wb") as log:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        process = subprocess.Popen(command, **pipes)  # type: ignore[call-overload]
    try:
        if name == "hf":
            yield OverPipe(process)
        else:
            engine = OverContract(process, folder / f"{name}.sock")
            try:
                yield engine
            finally:
                engine.close()
    except BaseException:
        print((folder / f"{name}.log").read_text()[-3000:], file=sys.stderr)
        raise
    finally:
        process.stdin.close()
        process.wait(60.0)


def make_tiny(path: Path) -> None:
    """The default run's policy with three attention heads of 32 in place of six of 16, the smallest
    that vLLM's CPU kernels have; random weights."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=352,
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=3,
        num_attention_heads=3,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    transformers.LlamaForCausalLM(config).save_pretrained(path)


def serve_generate(settings: dict[str, Any]) -> None:
    """One line of JSON in, how many tokens were sampled out; until the end of the input."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings["model_path"], dtype=getattr(torch, settings["dtype"])
    )
    num_parameters = sum(p.numel() for p in model.parameters())
    if settings["num_threads"] is not None or num_parameters < 5e6:  # as the embedded engine does
        torch.set_num_threads(settings["num_threads"] or 1)
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        ids = torch.tensor(job["prompts"])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            min_new_tokens=job["num_tokens"],
            max_new_tokens=job["num_tokens"],
            pad_token_id=0,
        )
        print(out[:, ids.shape[1] :].numel(), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["hf"]:
        serve_generate(json.loads(Path(sys.argv[2]).read_text()))
    else:
        main()
