"""What a grammar costs: tokens per second of the embedded engine with and without one.

    make bench-constrained ARGS="--at-once 32 --vocab 50000"

One run: a tokenizer trained on Python's own library, a small random model with its vocabulary, the
engine's real process, and rounds of the same requests without a grammar and with one, in turns. The
grammar's JSON cannot end before the requests' length does, so both sample equally many tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from sysconfig import get_path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from areal_sub.engine_client import EngineClient
from areal_sub.records import GenerateRequest, int32

STOP = "<|im_end|>"
SCHEMA = {
    "x-guidance": {"whitespace_pattern": r"( |\n[ \t]{0,24})"},
    "type": "array",
    "minItems": 100_000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "price": {"type": "number"},
            "tags": {"type": "array", "items": {"enum": ["new", "old", "sold"]}},
        },
        "required": ["name", "price", "tags"],
        "additionalProperties": False,
    },
}
GRAMMAR = "start: %json " + json.dumps(SCHEMA)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--num-tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocab", type=int, default=8000)
    parser.add_argument("--hidden", type=int, default=128, help="the model's width")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, _engine(Path(name), args) as socket_path:
        without, with_one = asyncio.run(_measure(socket_path, args))
    free, held = statistics.median(without), statistics.median(with_one)
    print(f"{args.at_once} requests at once, {args.num_tokens} tokens each, {args.rounds} rounds")
    print(f"without a grammar  {free:8.0f} tokens/s  ({min(without):.0f} to {max(without):.0f})")
    print(f"with one           {held:8.0f} tokens/s  ({min(with_one):.0f} to {max(with_one):.0f})")
    print(f"ratio              {held / free:8.2f}")


async def _measure(socket_path: Path, args: argparse.Namespace) -> tuple[list[float], list[float]]:
    client = await EngineClient.connect(socket_path, timeout_s=120.0)
    rates: dict[str, list[float]] = {"": [], GRAMMAR: []}
    try:
        for round_number in range(args.rounds + 1):
            for grammar, given in rates.items():
                started_at = time.perf_counter()
                await asyncio.gather(*(_one(client, grammar, args) for _ in range(args.at_once)))
                elapsed_s = time.perf_counter() - started_at
                if round_number:  # the first warms up: torch, and the process that grammars need
                    given.append(args.at_once * args.num_tokens / elapsed_s)
    finally:
        await client.close()
    return rates[""], rates[GRAMMAR]


async def _one(client: EngineClient, grammar: str, args: argparse.Namespace) -> None:
    request = GenerateRequest(
        prompt_token_ids=int32(range(1, 33)),
        max_new_tokens=args.num_tokens,
        temperature=1.0,
        # Without a grammar nothing may end a sequence early; with one, nothing does.
        stop_token_ids=[0] if grammar else [],
        grammar=grammar,
    )
    num_tokens = 0
    async for chunk in client.generate(request):
        num_tokens += len(chunk.token_ids)
    assert num_tokens == args.num_tokens, num_tokens


@contextmanager
def _engine(folder: Path, args: argparse.Namespace) -> Any:
    _make_model(folder, args)
    settings = {
        "socket_path": str(folder / "engine.sock"),
        "model_path": str(folder),
        "max_running_requests": args.at_once,
        "max_model_len": 32 + args.num_tokens,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    process = subprocess.Popen(
        [sys.executable, "-m", "areal_sub.engines.embedded", str(folder / "settings.json")],
        stdin=subprocess.PIPE,
    )
    try:
        yield folder / "engine.sock"
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(30.0)


def _make_model(folder: Path, args: argparse.Namespace) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab,
        special_tokens=[STOP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sources = sorted(Path(get_path("stdlib")).glob("*/*.py"))
    texts = (path.read_text("utf-8", errors="replace") for path in sources)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=2 * args.hidden,
        eos_token_id=0,
    )
    transformers.utils.logging.disable_progress_bar()
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    print(f"a model of {args.vocab} tokens, of which {tokenizer.get_vocab_size()} have a text")


if __name__ == "__main__":
    main()
