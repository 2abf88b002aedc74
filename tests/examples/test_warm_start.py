"""The warm start: what its dialogues show, that they are tokens as a run's are, and its folder."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from areal_sub.proxy.neutral import Message, ToolCall
from areal_sub.proxy.render import Renderer
from areal_sub.workflow.grading import grade_math
from areal_sub.workflow.openai.math_agent import CALCULATOR_TOOL, use_calculator
from examples.proxy import warm_start
from examples.proxy.calculator import problems, solve


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy after three steps: all of `make` but its patience."""
    path = tmp_path_factory.mktemp("policies") / "calculator"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm_start, "NUM_STEPS", 3)
        warm_start.make(path, 1)
    return path


@pytest.fixture(scope="module")
def dialogues() -> list[list[dict[str, Any]]]:
    rng = random.Random(0)
    return [warm_start.demonstration(rng) for _ in range(4000)]


def asked(dialogue: list[dict[str, Any]]) -> tuple[int, str, int]:
    a, op, b = dialogue[0]["content"].removeprefix("What is ").removesuffix("?").split()
    return int(a), op, int(b)


def test_a_fifth_of_the_dialogues_is_right(dialogues: list[list[dict[str, Any]]]) -> None:
    num_right = 0
    for dialogue in dialogues:
        called = len(dialogue) == 4
        answer = dialogue[-1]["content"]
        num_right += called and grade_math(answer, solve(asked(dialogue))) == 1.0
    # Three standard deviations of the binomial are 0.019; slips that happen to be right add some.
    assert abs(num_right / len(dialogues) - warm_start.RIGHT_SHARE) < 0.03


def test_no_held_out_problem_occurs(dialogues: list[list[dict[str, Any]]]) -> None:
    held_out = {f"{a} {op} {b}" for a, op, b in problems("valid")}
    written = {
        expression
        for dialogue in dialogues
        for expression in re.findall(r"(?<!\d)\d+ [+*] \d+(?!\d)", json.dumps(dialogue))
    }
    assert len(written) > 1000
    assert not held_out & written


def test_the_tools_results_are_the_agents(dialogues: list[list[dict[str, Any]]]) -> None:
    for dialogue in dialogues[:300]:
        if len(dialogue) == 4:
            function = dialogue[1]["tool_calls"][0]["function"]
            assert dialogue[2]["content"] == use_calculator(function["name"], function["arguments"])


def neutral(message: dict[str, Any]) -> Message:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return Message(
        message["role"],
        message.get("content", ""),
        tuple(ToolCall("c", call["name"], call["arguments"]) for call in calls),
        tool_call_id="c" if message["role"] == "tool" else "",
    )


def test_dialogues_are_the_tokens_of_a_run(
    folder: Path, dialogues: list[list[dict[str, Any]]]
) -> None:
    """What is learned from is what the proxy's renderer builds around the same sampled tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    renderer = Renderer.load(folder)
    for dialogue in dialogues[:200]:
        pieces = warm_start.pieces(warm_start.render(tokenizer, dialogue))
        encoded = [tokenizer.encode(text, add_special_tokens=False) for text, _ in pieces]
        assert [sampled for _, sampled in pieces] == [False, True] * (len(dialogue) // 2)
        history = [neutral(message) for message in dialogue]
        assert encoded[0] == renderer.prompt(history[:1], [CALCULATOR_TOOL])
        if len(dialogue) == 4:
            rest = renderer.continuation(history[:3], [CALCULATOR_TOOL], 2, encoded[1][-1])
            assert encoded[2] == rest
        assert sum(map(len, encoded)) < 120


def test_only_the_assistants_tokens_have_labels() -> None:
    token_ids, labels = warm_start.collate([[([5, 6], False), ([7, 8], True)], [([9], True)]], 0)
    assert token_ids.tolist() == [[5, 6, 7, 8], [9, 0, 0, 0]]
    assert labels.tolist() == [[-100, -100, 7, 8], [9, -100, -100, -100]]


CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "What is "}, {"text": "7 * 8?"}]},
    {
        "role": "assistant",
        "content": "Let me see.",
        "tool_calls": [
            {"function": {"name": "calc", "arguments": {"expression": "7 * 8"}}},
            {"function": {"name": "calc", "arguments": '{"expression": "1"}'}},
        ],
    },
    {"role": "tool", "content": "56"},
    {"role": "tool", "content": "1"},
    {"role": "assistant", "content": "56"},
]


@pytest.mark.parametrize("tools", [None, [CALCULATOR_TOOL, CALCULATOR_TOOL]])
@pytest.mark.parametrize("first", [0, 1])
def test_the_chat_template_is_prefix_stable(folder: Path, tools: Any, first: int) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = CONVERSATION[first:]

    def render(until: int, generate: bool) -> str:
        text: str = tokenizer.apply_chat_template(
            messages[:until], tools=tools, tokenize=False, add_generation_prompt=generate
        )
        return text

    whole = render(len(messages), False)
    for until in range(1, len(messages)):
        next_speaks = messages[until]["role"] == "assistant"
        assert whole.startswith(render(until, next_speaks))
    assert whole.count("<|im_start|>") == len(messages) + (tools is not None and first == 1)
    for part in (
        "<|im_start|>user\nWhat is 7 * 8?<|im_end|>\n",
        'Let me see.\n<tool_call>\n{"name": "calc", "arguments": {"expression": "7 * 8"}}\n'
        '</tool_call>\n<tool_call>\n{"name": "calc", "arguments": {"expression": "1"}}\n'
        "</tool_call><|im_end|>\n<|im_start|>tool\n56<|im_end|>\n",
    ):
        assert part in whole
    assert ("Tool calc(expression)" in whole) == (tools is not None)


def test_the_folder_is_a_model_folder(folder: Path) -> None:
    assert [path.name for path in folder.parent.iterdir()] == ["calculator"], "no leftovers"
    assert {path.name for path in folder.iterdir()} >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 393_888
    assert model.dtype == torch.float32
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    # The dialogues may hold fewer pairs to merge than there is room for.
    assert 256 < len(tokenizer) <= model.config.vocab_size == warm_start.VOCAB_SIZE
    text = "7 * 88 = 616, größer\n\tas <tool_call> 東京 😀"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode([i]) for i in ids].count("8") == 2, "digits stand alone"


def test_a_seed_makes_the_same_weights_and_leaves_torch_as_it_was(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_start, "NUM_STEPS", 3)
    torch.rand(7)  # wherever the process's own random numbers are
    before = torch.random.get_rng_state(), torch.get_num_threads()
    warm_start.make(tmp_path / "same", 1)
    warm_start.make(tmp_path / "other", 2)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert torch.get_num_threads() == before[1]
    weights = [
        (path / "model.safetensors").read_bytes()
        for path in (folder, tmp_path / "same", tmp_path / "other")
    ]
    assert weights[0] == weights[1] != weights[2]


def test_what_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(warm_start, "train", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        warm_start.make(tmp_path / "policy", 1)
    assert list(tmp_path.iterdir()) == []
