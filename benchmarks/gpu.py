"""The checks that need a GPU, as one script: losses, learner, engine and a whole run on one device.

    make gpu                                  # on the GPU
    make gpu ARGS="--device cpu --num-steps 1"   # the same code in small, where there is none

Each row is a check with its bound; the exit code is 1 where one fails. Figures (tokens per second)
are of this machine, on a tiny model: they say that it works, not how fast a real model is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from areal_sub.config.schema import ActorConfig
from areal_sub.engine_client import EngineClient
from areal_sub.learner.batch import PlainSample, Scored, micro_batches
from areal_sub.learner.loss import policy_loss, token_weights
from areal_sub.learner.model import PolicyModel
from areal_sub.records import GenerateRequest, float32, int32

ROOT = Path(__file__).parents[1]
OBJECTIVES: dict[str, dict[str, Any]] = {
    "ppo, dual clip": {"c_clip": 1.5},
    "cispo": {"objective": "cispo"},
    "gspo": {"importance_sampling_level": "sequence", "loss_agg_mode": "sequence_mean"},
    "decoupled, sequence mask": {
        "use_decoupled_loss": True,
        "rejection_sampling": {"level": "sequence", "upper": 1.5, "lower": 0.5},
    },
}
RUN_TIMEOUT_S = 1200.0


@dataclass(frozen=True, slots=True)
class Row:
    what: str
    measured: float
    bound: float  # the most that `measured` may be
    figure: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--num-steps", type=int, default=5, help="of the whole run")
    parser.add_argument("--policy", type=Path, help="a model folder for the whole run")
    args = parser.parse_args()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}")
    transformers.utils.logging.disable_progress_bar()
    checks: list[Callable[[], list[Row]]] = []
    failed = False
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        model = Path(folder) / "model"
        make_model(model)
        checks = [
            lambda: losses(device),
            lambda: learner(model, device),
            lambda: engine(model, device),
            lambda: whole_run(Path(folder), args),
        ]
        print(f"{'check':<56}{'measured':>12}{'bound':>10}")
        for check in checks:
            for row in check():
                failed |= not row.measured <= row.bound
                mark = "" if row.measured <= row.bound else "  FAILED"
                print(f"{row.what:<56}{row.measured:>12.2e}{row.bound:>10.0e}  {row.figure}{mark}")
    raise SystemExit(failed)


def make_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    made = subprocess.run(
        [sys.executable, "-c", _TOKENIZER, str(folder)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        raise SystemExit(made.stderr)


_TOKENIZER = """
import sys
from tokenizers import Tokenizer, models, pre_tokenizers
vocab = {f"<{i}>": i for i in range(512)}
Tokenizer(models.WordLevel(vocab, unk_token="<0>")).save(sys.argv[1] + "/tokenizer.json")
"""


def losses(device: torch.device) -> list[Row]:
    """Each objective's gradient on the device against float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(4096, generator=generator, dtype=torch.float64) * 0.3 for _ in range(4)]
    sequences = torch.arange(4096) // 64

    def gradient(actor: ActorConfig, where: torch.device, dtype: torch.dtype) -> torch.Tensor:
        rollout, proximal, advantages, trainer = (t.to(where, dtype) for t in drawn)
        rows = sequences.to(where)
        logprobs = trainer.requires_grad_()
        loss, _ = policy_loss(
            actor,
            trainer_logprobs=logprobs,
            rollout_logprobs=rollout,
            advantages=advantages,
            entropies=torch.zeros_like(rollout),
            sequences=rows,
            num_sequences=64,
            weights=token_weights(actor, rows, 64, num_batch_tokens=4096, num_batch_sequences=64),
            proximal_logprobs=proximal if actor.use_decoupled_loss else None,
        )
        (got,) = torch.autograd.grad(loss, logprobs)
        return got.cpu().double() * 4096

    out = []
    for name, options in OBJECTIVES.items():
        actor = ActorConfig.model_validate({"path": "x"} | options)
        exact = gradient(actor, torch.device("cpu"), torch.float64)
        got = gradient(actor, device, torch.float32)
        # A ratio at a bound may fall on either side of it: a share, not the worst token.
        differ = (got - exact).abs() > 1e-3 + 1e-3 * exact.abs()
        out.append(
            Row(f"loss, {name}: share of gradients off", differ.double().mean().item(), 1e-3)
        )
    return out


def learner(model: Path, device: torch.device) -> list[Row]:
    """Scores and gradients in float32 and bfloat16, packed rows, against float32 on the CPU."""
    rng = np.random.default_rng(0)
    items = []
    for length in rng.integers(16, 200, 32):
        mask = np.ones(length, np.bool_)
        mask[0] = False
        sample = PlainSample(
            int32(rng.integers(0, 512, length)), mask, float32(np.zeros(length)),
            int32(np.zeros(length)),
        )  # fmt: skip
        items.append(Scored(sample, float32(rng.standard_normal(length))))
    batches = micro_batches(items, 2048, pack=True)

    def scored(where: torch.device, dtype: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        policy = PolicyModel.load(
            str(model), dtype=dtype, device=where, gradient_checkpointing=True
        )
        assert policy.packs
        logprobs = []
        started_at = time.perf_counter()
        for batch in batches:
            batch = batch.to(where)
            scores = policy.score(batch, temperature=1.0)
            (scores.logprobs * batch.advantages).sum().backward()  # type: ignore[no-untyped-call]
            logprobs.append(scores.logprobs.detach().cpu())
        grads = torch.cat(
            [p.grad.flatten().cpu() for p in policy.parameters() if p.grad is not None]
        )
        return torch.cat(logprobs), grads, time.perf_counter() - started_at

    exact, exact_grads, _ = scored(torch.device("cpu"), "float32")
    out = []
    for dtype, bound in (("float32", 1e-3), ("bfloat16", 1e-1)):
        logprobs, grads, wall_s = scored(device, dtype)
        rate = f"{sum(b.num_inputs for b in batches) / wall_s:.0f} tokens/s"
        out.append(
            Row(f"learner, {dtype}: mean |Δ logprob|", _mean_delta(logprobs, exact), bound, rate)
        )
        distance = (grads - exact_grads).norm() / exact_grads.norm()
        out.append(Row(f"learner, {dtype}: gradient, relative", distance.item(), bound))
    return out


def _mean_delta(got: torch.Tensor, expected: torch.Tensor) -> float:
    return (got - expected).abs().mean().item()


def engine(model: Path, device: torch.device) -> list[Row]:
    """The embedded engine's process: its own logprobs against the learner's on the device."""
    with _engine(model, device) as socket_path:
        prompts, answers, wall_s = asyncio.run(_generate(socket_path))
    policy = PolicyModel.load(str(model), dtype="float32", device=device)
    items = []
    for prompt, (tokens, logprobs) in zip(prompts, answers, strict=True):
        ids = int32([*prompt, *tokens])
        mask = np.arange(len(ids)) >= len(prompt)
        padded = float32([*np.zeros(len(prompt)), *logprobs])
        sample = PlainSample(ids, mask, padded, int32(np.zeros(len(ids))))
        items.append(Scored(sample, float32(np.zeros(len(ids)))))
    worst, num_tokens = 0.0, 0
    with torch.no_grad():
        for batch in micro_batches(items, 4096, pack=policy.packs):
            batch = batch.to(device)
            delta = policy.score(batch, temperature=1.0).logprobs - batch.rollout_logprobs
            worst = max(worst, delta.abs().max().item())
            num_tokens += batch.num_trained_tokens
    rate = f"{num_tokens / wall_s:.0f} tokens/s, 16 at once"
    return [Row("engine, float32: max |Δ logprob| to learner", worst, 1e-2, rate)]


async def _generate(
    socket_path: Path,
) -> tuple[list[list[int]], list[tuple[list[int], list[float]]], float]:
    client = await EngineClient.connect(socket_path, timeout_s=120.0)
    prompts = [[(7 * i + j) % 500 + 1 for j in range(8 + i)] for i in range(16)]

    async def one(prompt: list[int]) -> tuple[list[int], list[float]]:
        request = GenerateRequest(
            prompt_token_ids=int32(prompt), max_new_tokens=64, temperature=1.0, stop_token_ids=[]
        )
        tokens: list[int] = []
        logprobs: list[float] = []
        async for chunk in client.generate(request):
            tokens += chunk.token_ids.tolist()
            logprobs += chunk.logprobs.tolist()
        return tokens, logprobs

    try:
        started_at = time.perf_counter()
        answers = await asyncio.gather(*(one(prompt) for prompt in prompts))
        return prompts, answers, time.perf_counter() - started_at
    finally:
        await client.close()


@contextmanager
def _engine(model: Path, device: torch.device) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="eng-") as name:
        settings = {
            "socket_path": f"{name}/engine.sock",
            "model_path": str(model),
            "device": str(device),
            "max_model_len": 128,
        }
        path = Path(name) / "settings.json"
        path.write_text(json.dumps(settings))
        command = [sys.executable, "-m", "areal_sub.engines.embedded", str(path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT)
        try:
            yield Path(name) / "engine.sock"
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(30.0)


def whole_run(folder: Path, args: argparse.Namespace) -> list[Row]:
    """The default configuration with learner and engine on the device."""
    command = [sys.executable, "-m", "areal_sub", "train"]
    command += ["--config", "examples/proxy/config.yaml", f"cluster.fileroot={folder}/runs"]
    command += [f"actor.device={args.device}", f"engine.device={args.device}"]
    command += [f"total_train_steps={args.num_steps}", "valid_dataset=null"]
    if args.policy:
        command += [f"actor.path={args.policy.resolve()}"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=RUN_TIMEOUT_S
    )
    if done.returncode:
        raise SystemExit(f"the run failed:\n{done.stdout}{done.stderr}")
    path = folder / "runs" / "calculator" / "default" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    wall_s = sum(row["time/step_s"] for row in rows) / len(rows)
    reward = f"reward {rows[0]['reward/train']:.2f} -> {rows[-1]['reward/train']:.2f}"
    first = rows[0]["learner/logprob_delta_mean"]
    not_verbatim = 1.0 - rows[-1]["exactness/share_verbatim"]
    return [
        Row("run: mean |Δ logprob| at step 1", first, 1e-3, f"{wall_s:.1f} s a step, {reward}"),
        Row("run: share of tokens not verbatim", not_verbatim, 0.0),
    ]


if __name__ == "__main__":
    main()
