"""One choice while it is sampled: engines may send any number of tokens at once."""

from __future__ import annotations

import pytest

from areal_sub.proxy.choice import Sampled
from areal_sub.proxy.families import FORMATS
from areal_sub.proxy.neutral import Call, Choice, Message
from areal_sub.proxy.vocabulary import Vocabulary
from areal_sub.records import GenerateChunk, float32, int32

TOOLS = ({"type": "function", "function": {"name": "f"}},)


def sample(
    vocabulary: Vocabulary, text: str, size: int, end: str = "stop", **asked: object
) -> tuple[Sampled, Choice]:
    """`text` in chunks of `size` tokens, as far as they were taken, and the answer."""
    call = Call(dialect="chat", model="m", messages=(Message("user"),), **asked)  # type: ignore[arg-type]
    hermes = FORMATS["hermes"]
    parser = hermes.parser(call.tools if call.parses_tool_calls else (), "")
    sampled = Sampled(call, vocabulary, vocabulary.hidden_ids(hermes.tags), parser)
    answer = Choice()
    ids = vocabulary.encode(text)
    for start in range(0, len(ids), size):
        part = ids[start : start + size]
        is_last = start + size >= len(ids)
        chunk = GenerateChunk(
            token_ids=int32(part),
            logprobs=float32([-1.0] * len(part)),
            versions=int32([0] * len(part)),
            finish_reason=end if is_last else None,
        )
        answer.add(sampled.take(chunk))
        if sampled.finish_reason is not None:
            break
    return sampled, answer


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_a_stop_string_ends_at_its_token_wherever_chunks_end(
    vocabulary: Vocabulary, size: int
) -> None:
    sampled, answer = sample(vocabulary, "one STOP two<|im_end|>", size, stop=("STOP",))
    assert vocabulary.decode(sampled.token_ids) == "one STOP"
    assert (answer.text, answer.finish_reason) == ("one ", "stop")
    assert len(sampled.logprobs) == len(sampled.versions) == len(sampled.token_ids)
    assert sampled.answer_with_stop() == Message("assistant", "one STOP")


def test_only_what_stopped_a_text_can_be_put_back(vocabulary: Vocabulary) -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    for text in ("one", f"{call}STOP"):
        sampled, _ = sample(vocabulary, text, 4, stop=("STOP",), tools=TOOLS)
        assert sampled.answer_with_stop() is None


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_the_answer_does_not_depend_on_the_chunks(vocabulary: Vocabulary, size: int) -> None:
    text = 'Größe 😀\n<tool_call>{"name": "f", "arguments": {}}</tool_call><|im_end|>'
    sampled, answer = sample(vocabulary, text, size, tools=TOOLS, logprobs=True)
    assert (answer.text, answer.finish_reason) == ("Größe 😀", "tool_calls")
    assert [call.name for call in answer.tool_calls] == ["f"]
    assert sampled.answer().content == answer.text
    assert sampled.token_ids == vocabulary.encode(text)
    assert len(answer.logprobs) == len(sampled.token_ids)


def test_a_call_cut_by_the_length_is_content(vocabulary: Vocabulary) -> None:
    text = '<tool_call>{"name": "f"'
    _, answer = sample(vocabulary, text, 4, end="length", tools=TOOLS)
    assert (answer.text, answer.finish_reason, answer.tool_calls) == (text, "length", [])
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call> and'
    _, answer = sample(vocabulary, text, 4, end="length", tools=TOOLS)
    assert (answer.text, answer.finish_reason) == ("and", "length")
    assert len(answer.tool_calls) == 1


def test_special_tokens_in_the_middle_have_no_text(vocabulary: Vocabulary) -> None:
    sampled, answer = sample(vocabulary, "a<|im_start|>b<think>c<|im_end|>", 2)
    assert answer.text == "ab<think>c"
    assert vocabulary.control_ids["<|im_start|>"] in sampled.token_ids
