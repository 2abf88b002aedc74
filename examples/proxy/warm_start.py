"""Makes the default run's policy: a tiny Llama that does the calculator task right now and then.

`make` is what `actor.warm_start` in `config.yaml` names; the trainer calls it once, where
`actor.path` is not there yet. It trains a byte-level BPE tokenizer and a 394k-parameter Llama on
synthetic dialogues of which only `RIGHT_SHARE` are right. That is all that RL needs, and what it
needs: it sharpens a behaviour that the policy already shows now and then; it cannot find one that
never occurs. The dialogues are rendered by the chat template that the run uses, with the tool that
the agent sends, and tokenised piece by piece as the proxy does; only training problems occur.
"""

from __future__ import annotations

import functools
import json
import logging
import random
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from areal_sub.workflow.openai.math_agent import CALCULATOR_TOOL
from examples.proxy.calculator import Problem, problems, question, solve

log = logging.getLogger(__name__)

RIGHT_SHARE = 0.2
"""Share of the demonstrations that end with the right answer."""
NUM_STEPS = 600
BATCH_SIZE = 12
LEARNING_RATE = 4e-3
WARMUP_STEPS = 20

VOCAB_SIZE = 352
EOS, PAD = "<|im_end|>", "<|endoftext|>"
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")

Message = dict[str, Any]


def make(path: Path, seed: int) -> None:
    """Train the policy and put it at `path` as a Hugging Face model folder, whole or not at all.

    The same seed gives the same weights on the same machine. Takes half a minute or so of one core.
    Global state of torch (threads, random numbers) is left as it was.
    """
    path = Path(path)
    started_at = time.monotonic()
    path.parent.mkdir(parents=True, exist_ok=True)
    num_threads = torch.get_num_threads()
    # For so small a model a second thread costs more than it brings, on a busy machine much more.
    torch.set_num_threads(1)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tokenizer = train_tokenizer(random.Random(seed))
            model = new_model(tokenizer)
            train(model, tokenizer, random.Random(seed))
        tokenizer.save_pretrained(unfinished)
        model.save_pretrained(unfinished)
        unfinished.chmod(0o755)  # mkdtemp makes it private
        try:
            unfinished.rename(path)
        except OSError:
            if not (path / "config.json").is_file():
                raise
            log.info("warm start: another run has made %s meanwhile", path)
    finally:
        torch.set_num_threads(num_threads)
        shutil.rmtree(unfinished, ignore_errors=True)
    log.info("warm start: done in %.0f s: %s", time.monotonic() - started_at, path)


def train_tokenizer(rng: random.Random) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `VOCAB_SIZE` tokens; digits stand alone, to be copied."""
    template = CHAT_TEMPLATE.read_text()
    blank = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), chat_template=template
    )
    corpus = [render(blank, demonstration(rng)) for _ in range(500)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        *(AddedToken(text, special=True, normalized=False) for text in (PAD, "<|im_start|>", EOS)),
        # Tokens of their own, and part of the text that a parser reads.
        *(AddedToken(text, normalized=False) for text in ("<tool_call>", "</tool_call>")),
    ]
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=added,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, chat_template=template
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Random weights from torch's global generator; 394k parameters, fp32."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=3,
        # Heads of 32: vLLM's kernels for CPUs have no smaller ones.
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=512,
        # 1/sqrt(hidden): with the usual 0.02, meant for wide models, copying comes too late.
        initializer_range=0.1,
        # Dialogues are ~80 tokens long: rotations this fast tell their positions apart.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).float()


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> None:
    """Next-token training on fresh demonstrations; only what the assistant writes has a loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARMUP_STEPS, max(0.05, 1 - step / NUM_STEPS)),
    )
    encode = functools.cache(functools.partial(tokenizer.encode, add_special_tokens=False))
    model.train()
    for step in range(NUM_STEPS):
        texts = [render(tokenizer, demonstration(rng)) for _ in range(BATCH_SIZE)]
        rows = [[(encode(piece), sampled) for piece, sampled in pieces(text)] for text in texts]
        token_ids, labels = collate(rows, tokenizer.pad_token_id)
        loss = model(input_ids=token_ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            log.info("warm start: step %d of %d, loss %.3f", step + 1, NUM_STEPS, loss.item())
    model.eval()


def pieces(text: str) -> list[tuple[str, bool]]:
    """A rendered dialogue cut as a run produces it: (text, did the assistant write it?).

    The assistant's pieces end with the end-of-turn token, as what is sampled does; what the
    template puts after it belongs to the next prompt.
    """
    return [
        (piece, index % 2 == 1)
        for index, piece in enumerate(_ASSISTANT_TURN.split(text))
        if piece.strip()
    ]


_ASSISTANT_TURN = re.compile(r"(?<=<\|im_start\|>assistant\n)(.*?<\|im_end\|>)", re.DOTALL)


def render(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> str:
    text: str = tokenizer.apply_chat_template(messages, tools=[CALCULATOR_TOOL], tokenize=False)
    return text


def collate(
    rows: list[list[tuple[list[int], bool]]], pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels [num_rows, longest], padded right; labels are -100 where not trained."""
    longest = max(sum(len(ids) for ids, _ in row) for row in rows)
    token_ids = torch.full((len(rows), longest), pad_token_id)
    labels = torch.full((len(rows), longest), -100)
    for index, row in enumerate(rows):
        flat = [token for ids, _ in row for token in ids]
        trained = [token if is_sampled else -100 for ids, is_sampled in row for token in ids]
        token_ids[index, : len(flat)] = torch.tensor(flat)
        labels[index, : len(trained)] = torch.tensor(trained)
    return token_ids, labels


def demonstration(rng: random.Random) -> list[Message]:
    """One dialogue; right with the probability `RIGHT_SHARE`.

    Half of them are about training problems, half about longer operands, which are too many to
    learn by heart: so the policy learns to copy what it reads, and the held-out problems are within
    its reach.

    It can go wrong in two places, as a policy can: the call and the answer. Each is right with
    the square root of the share. The slips are those of real models: a wrong operator or operand,
    broken JSON, a guess without the tool, an answer that is not the tool's.
    """
    problem = rng.choice(_TRAIN_PROBLEMS) if rng.random() < 0.5 else _long_problem(rng)
    asked_right, answered_right = (rng.random() < RIGHT_SHARE**0.5 for _ in range(2))
    messages: list[Message] = [{"role": "user", "content": question(problem)}]
    if asked_right:
        asked = problem
    else:
        match rng.random():
            case luck if luck < 0.15:
                return [*messages, _answer(rng.choice(problem[::2]))]
            case luck if luck < 0.35:
                return [*messages, _broken_call(problem, rng)]
            case _:
                asked = _slip_of_call(problem, rng)
    result = solve(asked)
    return [
        *messages,
        _call(asked),
        {"role": "tool", "content": str(result)},
        _answer(result if answered_right else _slip_of_answer(result, rng)),
    ]


_TRAIN_PROBLEMS = problems("train")
_HELD_OUT = frozenset(problems("valid"))


def _slip_of_call(problem: Problem, rng: random.Random) -> Problem:
    """Another problem than the one asked: wrong operator, an operand twice, a digit too many."""
    a, op, b = problem
    slips = [
        (a, "*" if op == "+" else "+", b),
        rng.choice([(a, op, a), (b, op, b)]),
        (10 * a + rng.randrange(10), op, b),
        (a, op, 10 * b + rng.randrange(10)),
    ]
    return rng.choice([slip for slip in slips if slip != problem and slip not in _HELD_OUT])


def _slip_of_answer(result: int, rng: random.Random) -> str:
    """Another number than the tool's: digits lost, swapped or doubled."""
    digits = str(result)
    slips = [digits[0], digits[-1], digits[::-1], digits[0] + digits, digits + digits[-1]]
    return rng.choice([slip for slip in slips if slip != digits])


def _long_problem(rng: random.Random) -> Problem:
    """One or both operands of two digits: none of these is a task."""
    lengths = rng.choice([(1, 2), (2, 1), (2, 2)])
    a, b = (rng.randrange(10 ** (length - 1), 10**length) for length in lengths)
    return a, rng.choice("+*"), b


def _answer(value: int | str) -> Message:
    return {"role": "assistant", "content": f"The answer is {value}"}


def _call(problem: Problem) -> Message:
    a, op, b = problem
    name = CALCULATOR_TOOL["function"]["name"]
    arguments = json.dumps({"expression": f"{a} {op} {b}"})
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }


def _broken_call(problem: Problem, rng: random.Random) -> Message:
    function = _call(problem)["tool_calls"][0]["function"]
    call = f'{{"name": "{function["name"]}", "arguments": {function["arguments"]}}}'
    text = rng.choice(
        [
            f"<tool_call>\n{call[:-1]}\n</tool_call>",  # a brace is missing
            f"<tool_call>\n{call}",  # never closed
        ]
    )
    return {"role": "assistant", "content": text}
