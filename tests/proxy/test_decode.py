"""Tokens to text in pieces: any cutting gives the same text, and nothing is given too early."""

from __future__ import annotations

import sys

from hypothesis import given
from hypothesis import strategies as st

from areal_sub.proxy.decode import REPLACEMENT, StopStrings, TextDecoder, num_held

# One token per byte, as far as decoding is concerned the hardest vocabulary.
HIDDEN = 256


def decode_bytes(token_ids: object) -> str:
    return bytes(token_ids).decode("utf-8", "replace")  # type: ignore[call-overload,no-any-return]


def cut(items: bytes | str, sizes: list[int]) -> list[object]:
    parts, start = [], 0
    for size in [*sizes, len(items)]:
        parts.append(items[start : start + size])
        start += size
    return parts


@given(st.text(max_size=30), st.lists(st.integers(0, 6), max_size=30))
def test_text_is_whole_however_it_is_cut(text: str, sizes: list[int]) -> None:
    decoder = TextDecoder(decode_bytes, {HIDDEN})
    pieces = [decoder.feed([*part, HIDDEN]) for part in cut(text.encode(), sizes)]  # type: ignore[misc]
    assert all(REPLACEMENT not in piece for piece in pieces) or REPLACEMENT in text
    assert "".join([*pieces, decoder.finish()]) == text


@given(st.binary(max_size=40))
def test_bytes_that_are_no_text_are_not_held_for_ever(raw: bytes) -> None:
    decoder = TextDecoder(decode_bytes, ())
    for byte in raw:
        decoder.feed([byte])
        assert len(decoder._pending) <= 4
    decoder.finish()


def test_half_a_character_is_held() -> None:
    decoder = TextDecoder(decode_bytes, ())
    euro = "€".encode()
    assert [decoder.feed([b]) for b in b"a" + euro] == ["a", "", "", "€"]
    assert decoder.feed(euro[:1]) == ""
    assert decoder.finish() == REPLACEMENT


def test_many_long_stop_strings_cost_a_few_steps_each() -> None:
    """However much is held back: agents choose them, and can have the policy say what they like."""
    strings = StopStrings(["a" * 255 + "b", *("<" * 255 + chr(98 + i) for i in range(15))])
    num_calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    for _ in range(100):
        strings.feed("aaaa")
    sys.setprofile(count)
    strings.feed("aaaa")
    sys.setprofile(None)
    assert num_calls < 100


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 5), max_size=20),
)
def test_stop_strings_cut_where_the_first_one_starts(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    filter_ = StopStrings(stops)
    out = ""
    for part in cut(text, sizes):
        out += filter_.feed(part)  # type: ignore[arg-type]
        assert text.startswith(out)
        if filter_.found:
            break
    else:
        out += filter_.finish()
    if not filter_.found:
        assert out == text
        assert not any(stop in text for stop in stops)
    else:
        # The cut ends where some stop string starts, and no whole one lies before.
        assert any(text[len(out) :].startswith(stop) for stop in stops)
        assert not any(stop in out for stop in stops)


def test_what_may_become_a_tag_is_held() -> None:
    assert num_held("a <too", "<tool>") == 4
    assert num_held("<tool>", "<tool>") == 0
    assert num_held("aa", "aab") == 2
