"""From a neutral call to a grammar, and what that grammar takes."""

from __future__ import annotations

import json
from typing import Any

import llguidance
import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_sub.proxy.constraints import MAX_GRAMMAR_CHARS, Reasoning, described_in, grammar_of
from areal_sub.proxy.families import FORMATS
from areal_sub.proxy.neutral import Call, Message, OutputFormat, ToolChoice
from areal_sub.proxy.parsers.hermes import HermesParser
from areal_sub.proxy.refusals import Refusal
from areal_sub.proxy.vocabulary import Vocabulary

# "a" is an integer, and must be there.
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def tool(name: str, parameters: Any = SCHEMA) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def call(**fields: Any) -> Call:
    given = {"dialect": "chat", "model": "m", "messages": (Message("user", "?"),)}
    return Call(**{**given, **fields})


def required(*names: str, **fields: Any) -> Call:
    tools = (tool("add"), tool("sub", {"type": "object", "properties": {"s": {"enum": ["x"]}}}))
    return call(**{"tools": tools, "tool_choice": ToolChoice("required", names), **fields})


@pytest.fixture(scope="module")
def takes(vocabulary: Vocabulary) -> Any:
    """Whether the grammar of a call takes a whole answer (control tokens meant as such)."""
    data = json.loads(vocabulary.full.to_str())
    for token in data["added_tokens"]:
        token["special"] = True
    tokenizer = llguidance.LLTokenizer(json.dumps(data))

    def check(asked: Call, answer: str, reasoning: Reasoning | None = None) -> bool:
        control_ids = vocabulary.control_ids
        grammar = grammar_of(asked, FORMATS["hermes"], control_ids, reasoning)
        matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        ids = vocabulary.encode(answer)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return check


def written(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@pytest.mark.parametrize(
    "asked",
    [
        call(),
        call(tools=(tool("add"),)),
        call(tools=(tool("add"),), tool_choice=ToolChoice("none")),
        call(tools=(tool("add"),), strict_tools=frozenset({"add"})),
        call(tools=(tool("add"),), parallel_tool_calls=False),
    ],
)
def test_what_may_be_anything_has_no_grammar(asked: Call) -> None:
    assert grammar_of(asked, FORMATS["hermes"], {}) == ""


@pytest.mark.parametrize(
    ("asked", "answer", "is_taken"),
    [
        (required(), written("add", '{"a": 1}'), True),
        (required(), written("sub", "{}"), True),
        (required(), written("add", '{"a": 1}') + "\n" + written("sub", '{"s": "x"}'), True),
        (required(), written("add", '{\n  "a": 1\n}'), True),
        (required(), written("add", '{"a": "1"}'), False),
        (required(), written("add", "{}"), False),
        (required(), written("mul", "{}"), False),
        (required(), "", False),
        (required(), "Well: " + written("add", '{"a": 1}'), False),
        (required(), written("add", '{"a": 1}') + "\n", False),
        (required(), written("add", '{"a":    1}'), False),
        (required("sub"), written("sub", "{}"), True),
        (required("sub"), written("add", '{"a": 1}'), False),
        (required(parallel_tool_calls=False), written("sub", "{}"), True),
        (required(parallel_tool_calls=False), written("sub", "{}") * 2, False),
        (required(tools=(tool("now", None),)), written("now", "{}"), True),
        (required(tools=(tool("now", None),)), written("now", '{"a": 1}'), False),
        (required(tools=(tool("any", {}),)), written("any", '{"a": [1, {"b": null}]}'), True),
        (required(tools=(tool("any", {}),)), written("any", "[1]"), False),
    ],
)
def test_forced_calls(takes: Any, asked: Call, answer: str, is_taken: bool) -> None:
    assert takes(asked, answer) is is_taken


JSON = OutputFormat("json_schema", SCHEMA)


@pytest.mark.parametrize(
    ("asked", "answer", "is_taken"),
    [
        (call(output_format=JSON), '{"a": 1}', True),
        (call(output_format=JSON), '{"a": "x"}', False),
        (call(output_format=JSON), 'Here: {"a": 1}', False),
        (call(output_format=OutputFormat("json_object")), '{"b": [1.5, "x"]}', True),
        (call(output_format=OutputFormat("json_object")), "[1]", False),
        (call(output_format=JSON, tools=(tool("add"),)), '{"a": 1}', True),
        (call(output_format=JSON, tools=(tool("add"),)), written("add", '{"a": 1}'), True),
        (
            call(output_format=JSON, tools=(tool("add"),), tool_choice=ToolChoice("none")),
            written("add", '{"a": 1}'),
            False,
        ),
        (required(output_format=JSON), '{"a": 1}', False),
    ],
)
def test_json(takes: Any, asked: Call, answer: str, is_taken: bool) -> None:
    assert takes(asked, answer) is is_taken


@pytest.mark.parametrize(
    ("answer", "is_taken"),
    [
        ("Just text, with {braces}.\n", True),
        ("", True),
        ("First " + written("sub", "{}") + "\nand " + written("sub", "{}"), True),
        ("First " + written("add", '{"a": 1}'), False),
    ],
)
def test_text_with_calls_of_some_tools_only(takes: Any, answer: str, is_taken: bool) -> None:
    asked = required(tool_choice=ToolChoice("auto", ("sub",)))
    assert takes(asked, answer) is is_taken


MAY_THINK = Reasoning("<think>", "</think>", False)
THINKS = Reasoning("<think>", "</think>", True)
AS_TEXT = [Reasoning("<reason>", "</reason>", begun) for begun in (False, True)]


@pytest.mark.parametrize(
    ("reasoning", "answer", "is_taken"),
    [
        (MAY_THINK, '{"a": 1}', True),
        (MAY_THINK, '<think>\nHm {"a"}.\n</think>\n\n{"a": 1}', True),
        (MAY_THINK, 'Hm.</think>\n\n{"a": 1}', False),
        (MAY_THINK, '<think>Hm.</think>Well: {"a": 1}', False),
        (THINKS, 'Hm.\n</think>\n\n{"a": 1}', True),
        (THINKS, '{"a": 1}', False),
        (AS_TEXT[0], '<reason>Hm <b>.</reason>{"a": 1}', True),
        (AS_TEXT[0], '{"a": 1}', True),
        (AS_TEXT[1], 'Hm <b>.\n</reason>\n{"a": 1}', True),
        (AS_TEXT[1], 'Hm.</reason>\n{"b": 1}', False),
        (None, '<think>Hm.</think>{"a": 1}', False),
    ],
)
def test_thinking_comes_first(
    takes: Any, reasoning: Reasoning | None, answer: str, is_taken: bool
) -> None:
    assert takes(call(output_format=JSON), answer, reasoning) is is_taken
    forced = answer.replace('{"a": 1}', written("add", '{"a": 1}'))
    assert takes(required(), forced, reasoning) is is_taken


def test_a_tag_that_is_no_token_is_text(takes: Any) -> None:
    grammar = grammar_of(required("sub"), FORMATS["hermes"], {})
    assert '"<tool_call>"' in grammar
    assert "<[" not in grammar
    with pytest.raises(Refusal, match="cannot restrict which tools"):
        grammar_of(required(tool_choice=ToolChoice("auto", ("sub",))), FORMATS["hermes"], {})


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20))
def test_any_name_of_a_tool(name: str) -> None:
    """Quotes, control characters, what looks like a tag or like grammar: it stays a name."""
    arguments = json.dumps({"name": name, "arguments": {}}, ensure_ascii=False)
    parser = HermesParser()
    asked = required(tools=(tool(name, {}),))
    pieces = parser.feed(f"<tool_call>\n{arguments}\n</tool_call>")
    if "</tool_call>" not in name:
        assert [getattr(piece, "name", None) for piece in pieces] == [name]
    grammar = grammar_of(asked, FORMATS["hermes"], {})
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    raw = list(f"<tool_call>\n{arguments}\n</tool_call>".encode())
    assert matcher.try_consume_tokens(raw) == len(raw)


def test_options_of_the_library_are_not_the_agents() -> None:
    hostile = {"x-guidance": {"whitespace_pattern": "(a|b)*a(a|b){100}"}, "type": "object"}
    given = call(output_format=OutputFormat("json_schema", hostile))
    assert "a|b" not in grammar_of(given, FORMATS["hermes"], {})


def test_what_cannot_be_held_to_is_ignored_unless_strict(takes: Any) -> None:
    odd = {"type": "object", "properties": {"a": {"type": "string", "format": "my-own"}}}
    loose = call(output_format=OutputFormat("json_schema", odd, strict=False))
    assert takes(loose, '{"a": "x"}')
    with pytest.raises(AssertionError, match="Unknown format: my-own"):
        takes(call(output_format=OutputFormat("json_schema", odd)), '{"a": "x"}')
    assert takes(required(tools=(tool("f", odd),)), written("f", '{"a": "x"}'))
    with pytest.raises(AssertionError, match="Unknown format: my-own"):
        strict = required(tools=(tool("f", odd),), strict_tools=frozenset({"f"}))
        takes(strict, written("f", '{"a": "x"}'))


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        (required(tools=()), "tool_choice"),
        (required("mul"), "tool_choice"),
        (required(tools=(tool("f", ["x"]),)), "tools"),
        (required(tools=(tool("f", {"const": "x" * MAX_GRAMMAR_CHARS}),)), "tools"),
        (
            call(output_format=OutputFormat("json_schema", {"const": "x" * MAX_GRAMMAR_CHARS})),
            "response_format",
        ),
    ],
)
def test_refusals_name_the_field(asked: Call, param: str) -> None:
    with pytest.raises(Refusal) as caught:
        grammar_of(asked, FORMATS["hermes"], {})
    assert (caught.value.status, caught.value.param) == (400, param)


ID = 2**60 + 1


@pytest.mark.parametrize(
    "schema",
    [
        {"const": ID},
        {"properties": {"id": {"enum": ["none", -ID]}}},
        {"anyOf": [{"const": {"ids": [{"id": ID}]}}]},
    ],
)
def test_an_integer_that_json_readers_take_for_another_is_refused(schema: Any) -> None:
    for asked in (
        call(output_format=OutputFormat("json_schema", schema)),
        required(tools=(tool("f", schema),)),
    ):
        with pytest.raises(Refusal, match=f"{ID}: integers beyond"):
            grammar_of(asked, FORMATS["hermes"], {})


def test_bounds_beyond_exact_integers_are_taken(takes: Any) -> None:
    bounded = {"type": "integer", "minimum": 0, "maximum": 2**64 - 1}
    assert takes(call(output_format=OutputFormat("json_schema", bounded)), "17")
    assert takes(call(output_format=OutputFormat("json_schema", {"const": 2**53})), str(2**53))


def test_where_a_fault_is() -> None:
    assert described_in(required(output_format=JSON)) == "tools"
    assert described_in(call(output_format=JSON, tools=(tool("f"),))) == "response_format"
