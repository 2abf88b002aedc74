"""The Hermes parser: the same whole or in pieces, early with text, strict with calls."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_sub.proxy.parsers import ParsedCall, Piece
from areal_sub.proxy.parsers.hermes import HermesParser


def parse(*texts: str) -> list[Piece]:
    """What comes of it, with neighbouring content joined."""
    parser = HermesParser()
    pieces: list[Piece] = []
    for text in texts:
        pieces += parser.feed(text)
    joined: list[Piece] = []
    for piece in [*pieces, *parser.finish()]:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


GOOD = '<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call>'
CALL = ParsedCall("f", '{"x": "é"}')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("  hello \n", ["  hello \n"]),
        (GOOD, [CALL]),
        (f"\n{GOOD}\n{GOOD}\n", [CALL, CALL]),
        (f"Think.\n\n{GOOD}\nThen.", ["Think.", CALL, "Then."]),
        ("a <tool", ["a <tool"]),
        ("a < b <tool_calls>", ["a < b <tool_calls>"]),
    ],
)
def test_content_and_calls(text: str, expected: list[Piece]) -> None:
    assert parse(text) == expected


TAGGED = '<tool_call>\n{"name": "f", "arguments": {"x": "\\\\\\"</tool_call>"}}\n</tool_call>'
TORN = '<tool_call>{"name: 1}</tool_call>'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TAGGED, [ParsedCall("f", '{"x": "\\\\\\"</tool_call>"}')]),
        (f"{TAGGED}\n{GOOD}", [ParsedCall("f", '{"x": "\\\\\\"</tool_call>"}'), CALL]),
        # Its quote is never closed, so all that follows might be its string's: or it is no call.
        (f"{TORN}\n{GOOD} then", [TORN, CALL, "then"]),
        (f"{GOOD} {TORN} {TORN}", [CALL, f"{TORN} {TORN}"]),
    ],
)
def test_a_tag_in_a_string_of_a_call(text: str, expected: list[Piece]) -> None:
    assert parse(text) == expected
    assert parse(*text) == expected


@pytest.mark.parametrize(
    "body",
    [
        "",
        "not json",
        "[]",
        '"f"',
        '{"name": "f"}',
        '{"name": "", "arguments": {}}',
        '{"name": 1, "arguments": {}}',
        '{"name": "f", "arguments": "{}"}',
        '{"name": "f", "arguments": {"x": NaN}}',
        '{"name": "f", "arguments": {"x": "\\ud800"}}',
        '{"name": "f", "arguments": {}} trailing',
        '{"name": "f", "arguments": ' + '{"a":' * 70 + "1" + "}" * 71,
        "[" * 100_000,
    ],
)
def test_malformed_calls_are_content(body: str) -> None:
    text = f"<tool_call>{body}</tool_call>"
    assert parse(text) == [text]
    assert parse(f"a {text} b{GOOD}") == [f"a {text} b", CALL]


def test_a_call_that_is_never_closed_is_content() -> None:
    text = 'x <tool_call>\n{"name": "f", "arguments": {}}'
    assert parse(text) == [text]


def test_text_is_given_as_soon_as_it_is_certain() -> None:
    parser = HermesParser()
    assert parser.feed("Hi") == ["Hi"]
    assert parser.feed(" you") == [" you"]
    assert parser.feed(" \n<tool") == []
    assert parser.feed("box>") == [" \n<toolbox>"]
    assert parser.feed(GOOD[:-1]) == []
    assert parser.feed(">") == [CALL]


PARTS = st.sampled_from(
    [
        GOOD,
        "<tool_call>",
        "</tool_call>",
        "{}",
        " ",
        "\n",
        "text",
        "<",
        "tool_call>",
        "<tool_call>x",
        '"',
        "\\",
        TAGGED,
    ]
)


@given(st.lists(PARTS, max_size=8).map("".join), st.lists(st.integers(0, 12), max_size=40))
def test_pieces_and_whole_agree(text: str, sizes: list[int]) -> None:
    parts, start = [], 0
    for size in [*sizes, len(text)]:
        parts.append(text[start : start + size])
        start += size
    assert parse(*parts) == parse(text)
