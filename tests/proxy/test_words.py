"""Texts that are encoded by their words have the ids that they have as a whole."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from areal_sub.proxy import words
from areal_sub.proxy.words import Words, cuts_at_words

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
)
SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
REST = r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
O200K = CASED.replace("|[^", SHORT + "|[^") + SHORT + REST

byte_level = partial(pre_tokenizers.ByteLevel, add_prefix_space=False)


def split(pattern: str, behavior: str = "isolated", invert: bool = False) -> Any:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior, invert), byte_level(use_regex=False)]
    )


CUT = {
    "gpt2": byte_level(),
    "with a space in front": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level()]),
    "llama3": split(LLAMA3),
    "qwen": split(LLAMA3.replace("{1,3}", "")),
    "o200k": split(O200K),
    "mistral": split(CASED + REST),
}
NOT_CUT = {
    "none": None,
    "of one piece": byte_level(use_regex=False),
    "sentencepiece": pre_tokenizers.Metaspace(),
    "across words": split(r" ?\p{L}+( \p{L}+)?|\s+"),
    "merged": split(LLAMA3, "merged_with_next"),
    "inverted": split(LLAMA3, invert=True),
    "of numbers": split(r"\p{N}"),
    "without signs": split(LLAMA3.replace(r"| ?[^\s\p{L}\p{N}]+[\r\n]*", "")),
    "without space": split(LLAMA3.removesuffix(r"|\s+")),
}

# What may stand around a space: letters, marks, signs, digits, more space, what composes.
PIECES = st.sampled_from(
    [*"aZéßÅ中.,!'\"-_/()1789\n\r\t\u00a0\u3000", " ", " ", " a", " The", "'s", "'LL", " the ",
     "e\u0301", "\u0301", "\u200d", "😀", "\r\n", "  ", "of", "ing", "x1", "<tool_call>"]
)  # fmt: skip
TEXTS = st.one_of(st.lists(PIECES, max_size=20).map("".join), st.text(max_size=20))


def tokenizer_of(pre_tokenizer: Any, normalizer: Any = None) -> Tokenizer:
    """It merges whatever stands often side by side, also spaces and the letters around them."""
    tokenizer = Tokenizer(models.BPE())
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    said = "The thing, of the a. The é 中 of x1 789!\nIt's the thing's. a a a the of "
    tokenizer.train_from_iterator([said * 4], trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def description(tokenizer: Tokenizer) -> dict[str, Any]:
    described: dict[str, Any] = json.loads(tokenizer.to_str())
    return described


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()], ids=["plain", "nfc"])
@pytest.mark.parametrize("pre_tokenizer", CUT.values(), ids=CUT)
def test_a_text_is_its_words(pre_tokenizer: Any, normalizer: Any) -> None:
    tokenizer = tokenizer_of(pre_tokenizer, normalizer)
    assert cuts_at_words(description(tokenizer))
    cut = Words(partial(encode, tokenizer))

    @given(TEXTS)
    def check(text: str) -> None:
        [whole] = encode(tokenizer, [text])
        assert cut.ids(text) == whole
        assert cut.ids(text) == whole  # from memory

    check()


@pytest.mark.parametrize("pre_tokenizer", NOT_CUT.values(), ids=NOT_CUT)
def test_whose_tokens_may_reach_across_words_is_left_whole(pre_tokenizer: Any) -> None:
    assert not cuts_at_words(description(tokenizer_of(pre_tokenizer)))


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"added_tokens": [{"content": "  "}]},
        {"model": {"type": "BPE", "dropout": 0.1}},
        {"model": {"type": "Unigram"}},
    ],
)
def test_what_else_may_change_a_word_by_its_neighbours(change: dict[str, Any]) -> None:
    described = description(tokenizer_of(byte_level()))
    assert cuts_at_words(described)
    assert not cuts_at_words(described | change)


def test_words_are_encoded_once_and_their_number_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(words, "MAX_WORDS", 4)
    asked: list[str] = []

    def lengths(texts: list[str]) -> list[list[int]]:
        asked.extend(texts)
        return [[len(text)] for text in texts]

    cut = Words(lengths)
    assert cut.ids("one two, two") == [3, 5, 4]
    assert cut.ids("one two, two and") == [3, 5, 4, 4]
    assert asked == ["one", " two,", " two", " and"]
    assert cut.ids("so and") == [2, 4]  # one too many: it forgets what it knew
    assert cut.ids("one and") == [3, 4]
    assert asked[4:] == ["so", "one", " and"]
    long = "x" * 65
    assert cut.ids(long) == cut.ids(long) == [65]
    assert asked[7:] == [long, long]


def test_a_text_of_new_words_is_encoded_whole_and_learned_from() -> None:
    asked: list[list[str]] = []

    def lengths(texts: list[str]) -> list[list[int]]:
        asked.append(texts)
        return [[len(text)] for text in texts]

    cut = Words(lengths)
    text = " ".join(f"w{i}" for i in range(words.MAX_NEW + 2))
    assert cut.ids(text) == [len(text)]
    assert [len(texts) for texts in asked] == [words.MAX_NEW, 1]
    assert cut.ids(text) == [2, *[3] * (words.MAX_NEW + 1)]
    assert asked[2:] == [[" w8", " w9"]]
