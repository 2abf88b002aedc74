"""The parsers: what is read, what stays text, and that pieces and whole agree."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from model_families import FAMILIES, TOOLS

from areal_sub.proxy.families import FORMATS, AnswerFormat, choose
from areal_sub.proxy.neutral import MAX_DEPTH, Message, Thought, ToolCall, is_deeper_than
from areal_sub.proxy.parsers import ParsedCall, Piece

# Each with its reasoning, where it has one.
READERS = {name: choose(name, "think" if name != "none" else "none", "") for name in FORMATS}


def read(answer_format: AnswerFormat, *texts: str, prompt_end: str = "") -> list[Piece]:
    """What comes of it, with neighbouring pieces of one kind joined."""
    parser = answer_format.parser(TOOLS, prompt_end)
    pieces: list[Piece] = []
    for text in texts:
        pieces += parser.feed(text)
    joined: list[Piece] = []
    for piece in [*pieces, *parser.finish()]:
        last = joined[-1] if joined else None
        if isinstance(piece, str) and isinstance(last, str):
            joined[-1] = last + piece
        elif isinstance(piece, Thought) and isinstance(last, Thought):
            joined[-1] = Thought(last.text + piece.text)
        else:
            joined.append(piece)
    return joined


A7 = ParsedCall("calc", '{"a": 7}')

# (format, text, what it says)
READ: list[tuple[str, str, list[Piece]]] = [
    ("hermes", '<think>\nhm\n</think>\n\nSo <tool_call>{"name": "calc", "arguments": {"a": 7}}'
     "</tool_call>", [Thought("hm"), "So", A7]),
    ("hermes", '<tool_call>[{"name": "calc", "arguments": {"a": 7}}, {"name": "calc", "arguments":'
     ' {"a": 7}}]</tool_call>', [A7, A7]),
    ("qwen3_coder", "<tool_call>\n<function=calc>\n<parameter=a>\n7\n</parameter>\n</function>\n"
     "</tool_call>", [A7]),
    ("qwen3_coder", "<tool_call><function=calc><parameter=a>7</parameter><parameter=op>\n\n7\n"
     "</parameter></function></tool_call>", [ParsedCall("calc", '{"a": 7, "op": "\\n7"}')]),
    ("qwen3_coder", "<tool_call><function=calc><parameter=a>seven</parameter><parameter=more>"
     '{"b": [True]}</parameter></function></tool_call>',
     [ParsedCall("calc", '{"a": "seven", "more": "{\\"b\\": [True]}"}')]),
    ("qwen3_coder", "<tool_call><function=other><parameter=a>7</parameter></function></tool_call>",
     [ParsedCall("other", '{"a": "7"}')]),
    ("llama3_json", '{"name": "calc", "parameters": {"a": 7}}', [A7]),
    ("llama3_json", '<|python_tag|> {"name": "calc", "parameters": {"a": 7}}', [A7]),
    ("llama3_json", '{"name": "calc", "arguments": {"a": 7}};\n{"name": "calc", "parameters":'
     ' {"a": 7}} done', [A7, A7, "done"]),
    ("llama3_json", '{"name": "}\\"{", "parameters": {"a": 7}}', [ParsedCall('}"{', '{"a": 7}')]),
    ("pythonic", "[calc(a=7), calc(a=7,)]", [A7, A7]),
    ("pythonic", " <|python_start|>[a.b(s='it\\'s', t=\"\\u00e9\", l=[1, -2.5e3, None], d={'k': "
     "True})]<|python_end|>", [ParsedCall("a.b", '{"s": "it\'s", "t": "é", "l": [1, -2500.0, null]'
     ', "d": {"k": true}}')]),
    ("pythonic", "[now()]", [ParsedCall("now", "{}")]),
    ("mistral", '[TOOL_CALLS][{"name": "calc", "arguments": {"a": 7}, "id": "Abc123xyZ"}]',
     [ParsedCall("calc", '{"a": 7}', "Abc123xyZ")]),
    ("mistral", '[TOOL_CALLS] [ {"name": "calc", "arguments": {"a": 7}, "id": "short"}]', [A7]),
    ("mistral", 'Well.[TOOL_CALLS]calc[CALL_ID]Abc123xyZ[ARGS]{"a": 7}[TOOL_CALLS]calc[ARGS]'
     '{"a": 7}', ["Well.", ParsedCall("calc", '{"a": 7}', "Abc123xyZ"), A7]),
    ("mistral", '[THINK]hm[/THINK]So[TOOL_CALLS]calc{"a": 7} ', [Thought("hm"), "So", A7]),
    ("gemma4", "<|channel>thought\nhm\n<channel|>So<|tool_call>call:calc{a:7}<tool_call|>",
     [Thought("hm"), "So", A7]),
    ("gemma4", '<|tool_call>call:f{s:<|"|>a}"b<|"|>,l:[1,true,null],o:{k k:-1.5,<|"|>q<|"|>:2}}'
     "<tool_call|>", [ParsedCall("f", '{"s": "a}\\"b", "l": [1, true, null], "o": {"k k": -1.5, '
     '"q": 2}}')]),
    ("harmony", "<|channel|>analysis<|message|>hm<|end|><|start|>assistant to=functions.calc"
     '<|channel|>commentary json<|message|>{"a": 7}<|call|>', [Thought("hm"), A7]),
    ("harmony", "<|channel|>analysis to=functions.calc code<|message|>{\"a\": 7}<|call|>", [A7]),
    ("harmony", "<|channel|>commentary<|message|>First.<|end|><|start|>assistant<|channel|>final"
     "<|message|>Then.<|return|>", ["First.\n\nThen."]),
    ("harmony", "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis"
     "<|message|>b<|end|><|start|>assistant<|channel|>fin", [Thought("a\n\nb")]),
    ("harmony", "<|channel|>final<|message|>cut of<|start|>assistant", ["cut of"]),
    ("harmony", "no header at all", ["no header at all"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "expected"), READ)
def test_what_is_read(name: str, text: str, expected: list[Piece]) -> None:
    answer_format = READERS[name]
    assert read(answer_format, text) == expected
    assert read(answer_format, *text) == expected
    for cut in range(len(text)):
        assert read(answer_format, text[:cut], text[cut:]) == expected


BAD_JSON = [
    "",
    "not json",
    '"f"',
    '{"a": NaN}',
    '{"a": 1e999}',
    '{"a": "\\ud800"}',
    '{"a":' * 70 + "1" + "}" * 70,
]

STAYS = [
    *(
        ("hermes", f'<tool_call>{{"name": "f", "arguments": {bad}}}</tool_call>')
        for bad in BAD_JSON
    ),
    ("hermes", '<tool_call>[{"name": "f", "arguments": {}}, 1]</tool_call>'),
    ("hermes", "<tool_call>[]</tool_call>"),
    ("qwen3_coder", "<tool_call><function=></function></tool_call>"),
    ("qwen3_coder", "<tool_call><function=f>text</function></tool_call>"),
    ("qwen3_coder", "<tool_call><function=f><parameter=a>1</function></tool_call>"),
    ("qwen3_coder", "<tool_call><function=f><parameter=a>1</parameter><parameter=a>2</parameter>"
     "</function></tool_call>"),
    ("qwen3_coder", '<tool_call>{"name": "f", "arguments": {}}</tool_call>'),
    *(("llama3_json", f'{{"name": "f", "parameters": {bad}}}') for bad in BAD_JSON),
    ("llama3_json", '{"answer": 56}'),
    ("llama3_json", 'Use {"name": "f", "parameters": {}}'),
    ("llama3_json", '{"name": "f", "parameters": {}'),
    ("llama3_json", "[" * 100_000),
    ("pythonic", "[1, 2]"),
    ("pythonic", "[f(1)]"),
    ("pythonic", "[f(a=b)]"),
    ("pythonic", "[f(a=1)"),
    ("pythonic", "[f(a=1)] and more"),
    ("pythonic", "[f(a=" + "[" * 70 + "]" * 70 + ")]"),
    ("pythonic", "[f(a=" + "[" * 100_000),
    ("pythonic", "[f(a=" + "1" * 5000 + ")]"),
    ("pythonic", "[f(a=1e999)]"),
    ("pythonic", "[f(a=1, a=2)]"),
    ("pythonic", "[f(a=__import__('os'))]"),
    ("pythonic", "[f(a='\\ud800')]"),
    *(("mistral", f"[TOOL_CALLS]f[ARGS]{bad}") for bad in BAD_JSON),
    ("mistral", '[TOOL_CALLS][{"name": "f"}]'),
    ("mistral", '[TOOL_CALLS]two words[ARGS]{"a": 1}'),
    ("mistral", "[TOOL_CALLS]" + "f" * 600 + '{"a": 1}'),
    ("mistral", "[TOOL_CALLS] " * 3),
    ("gemma4", "<|tool_call>calc{a:1}<tool_call|>"),
    ("gemma4", '<|tool_call>call:calc{a:<|"|>x}<tool_call|>'),
    ("gemma4", "<|tool_call>call:calc{a:1}}<tool_call|>"),
    ("gemma4", "<|tool_call>call:calc{a:" + "[" * 70 + "]" * 70 + "}<tool_call|>"),
    ("harmony", "x" * 1000 + "<|message|>"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), STAYS)
def test_what_is_malformed_stays_text(name: str, text: str) -> None:
    assert read(READERS[name], text) == [text]
    if len(text) < 2000:
        assert read(READERS[name], *text) == [text]


def test_a_malformed_harmony_call_is_text() -> None:
    text = "<|channel|>commentary to=functions.f<|message|>{broken<|call|>"
    assert read(READERS["harmony"], text) == [text]
    cut = text.removesuffix("<|call|>")
    assert read(READERS["harmony"], cut) == [cut]


def test_a_prompt_that_begins_the_answer() -> None:
    end = "<|start|>assistant<|channel|>analysis<|message|>"
    text = "hm<|end|><|start|>assistant<|channel|>final<|message|>56"
    assert read(READERS["harmony"], text, prompt_end=end) == [Thought("hm"), "56"]
    assert read(READERS["mistral"], "hm[/THINK]56", prompt_end="[THINK]") == [Thought("hm"), "56"]
    end = "<|channel>thought\n"
    assert read(READERS["gemma4"], "hm\n<channel|>56", prompt_end=end) == [Thought("hm"), "56"]


def test_without_tools_calls_are_text_and_reasoning_is_not() -> None:
    text = '<think>hm</think><tool_call>{"name": "f", "arguments": {}}</tool_call>'
    parser = READERS["hermes"].parser((), "")
    assert [*parser.feed(text), *parser.finish()] == [Thought("hm"), text.partition("</think>")[2]]


def test_text_is_given_as_soon_as_it_is_certain() -> None:
    parser = READERS["harmony"].parser(TOOLS, "")
    assert parser.feed("<|channel|>final<|message|>") == []
    assert parser.feed("Hi") == ["Hi"]
    assert parser.feed(" you <|e") == [" you "]
    assert parser.feed("x|>") == ["<|ex|>"]
    parser = READERS["mistral"].parser(TOOLS, "")
    assert parser.feed("Hi [TOOL") == ["Hi "]
    assert parser.feed('_CALLS]f[ARGS]{"a": ') == []
    assert parser.feed("1}") == [ParsedCall("f", '{"a": 1}')]
    parser = READERS["llama3_json"].parser(TOOLS, "")
    assert parser.feed("Hi") == ["Hi"]
    assert parser.feed(' {"name') == [' {"name']
    parser = READERS["pythonic"].parser(TOOLS, "")
    assert parser.feed("[1") == ["[1"]


FRAGMENTS = sorted(
    {tag for answer_format in READERS.values() for tag in answer_format.tags}
    | {text for _, text, _ in READ}
    | {"<function=f>", "<parameter=a>", "</parameter>", "</function>", "call:f{", "f[ARGS]"}
    | {"to=functions.f", "assistant", "analysis", "final", "[f(a=1", ")]", '{"name": "f"', "}"}
    | {" ", "\n", "text", "<", "|>", "[", "{", '"', "\\", ",", ":", "é😀", ";"}
)


@pytest.mark.parametrize("name", FORMATS)
@given(
    fragments=st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=4)), max_size=8),
    sizes=st.lists(st.integers(0, 9), max_size=60),
)
def test_pieces_and_whole_agree(name: str, fragments: list[str], sizes: list[int]) -> None:
    text = "".join(fragments)
    parts, start = [], 0
    for size in [*sizes, len(text)]:
        parts.append(text[start : start + size])
        start += size
    whole = read(READERS[name], text)
    assert read(READERS[name], *parts) == whole
    for piece in whole:
        if isinstance(piece, ParsedCall):
            assert isinstance(orjson.loads(piece.arguments), dict)
            assert not is_deeper_than(orjson.loads(piece.arguments), MAX_DEPTH)
            assert piece.name
    assert "" not in whole and Thought("") not in whole


VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=4), inner)
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@given(op=st.text(max_size=12), more=st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3))
def test_any_arguments_come_back(family: Any, op: str, more: dict[str, Any]) -> None:
    """Save texts that hold the very tag that ends them: no format has an escape for that."""
    arguments = json.dumps({"op": op, "more": more})
    call = ToolCall("Abc123xyZ", "calc", arguments)
    text = family.writes(Message("assistant", "", (call,)))
    if family.format in ("qwen3_coder", "gemma4"):
        arguments_text = json.dumps([op, more], ensure_ascii=False)
        if "<" in arguments_text or not _has_plain_keys(more):
            return
    answer_format = choose(family.format, family.reasoning_parser, "")
    *_, read_call = read(answer_format, text + family.end_of_calls * (family.format == "harmony"))
    assert isinstance(read_call, ParsedCall), text
    assert json.loads(read_call.arguments) == {"op": op, "more": more}


def _has_plain_keys(value: Any) -> bool:
    if isinstance(value, dict):
        return all(key.isidentifier() and key.isascii() and _has_plain_keys(item)
                   for key, item in value.items())  # fmt: skip
    return not isinstance(value, list) or all(map(_has_plain_keys, value))
