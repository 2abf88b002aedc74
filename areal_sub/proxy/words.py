"""Token ids of the words of a text, which mostly came before in another one.

Tokenizing is the dearest part of a model call, and what agents say is new as a whole, but not in
its words. With most tokenizers no token reaches over the space between two of them: their
pre-tokenizers cut there, before anything is merged. `cuts_at_words` says of which that is certain,
by what their pre-tokenizers consist of; the others' texts are tokenized whole.

Owns `Words`: the words that came lately, bounded, for all rollouts of a proxy. Any thread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

# Some 10 MB.
MAX_WORDS = 32_768
MAX_WORD_CHARS = 64
# Of one text: to encode a word for itself takes several times as long as in its text.
MAX_NEW = 8

# In front of a single space, and where no normalizer could join what is before and behind.
_CUT = re.compile(r"(?<=[!-~])(?= [!-~])")

_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
# What patterns are made of: none of these takes a space behind anything but space, nor tells what
# is there. With one of each kind that has to be there, all is taken, so none goes on over a space.
_LETTERS = {
    r" ?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    *_CASED,
    *(f"{pattern}{_SHORT}?" for pattern in _CASED),
}
_SIGNS = {
    r" ?[^\s\p{L}\p{N}]+",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
}
_SPACE = {r"\s+"}
_NUMBERS = {r"\p{N}", r"\p{N}{1,3}", r" ?\p{N}+"}
_OTHERS = {
    *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"),
    _SHORT,
    r"\s*[\r\n]+",
    r"\s*[\r\n]",
    r"\s+(?!\S)",
}
_NEEDED = (_LETTERS, _SIGNS, _SPACE)
_UNDERSTOOD = _LETTERS | _SIGNS | _SPACE | _NUMBERS | _OTHERS


class Words:
    def __init__(self, encode: Callable[[list[str]], list[list[int]]]) -> None:
        """`encode`: the ids of several texts, each for itself."""
        self._encode = encode
        self._known: dict[str, tuple[int, ...]] = {}

    def ids(self, text: str) -> list[int]:
        words = _CUT.split(text)
        found = [*map(self._known.get, words)]
        if None in found:
            unknown = dict.fromkeys(w for w, ids in zip(words, found, strict=True) if ids is None)
            new = self._learn([*unknown][:MAX_NEW])
            if len(unknown) > MAX_NEW:
                [whole] = self._encode([text])
                return whole
            found = [new[w] if ids is None else ids for w, ids in zip(words, found, strict=True)]
        return [*chain.from_iterable(found)]  # type: ignore[arg-type]

    def _learn(self, words: list[str]) -> dict[str, tuple[int, ...]]:
        new = dict(zip(words, map(tuple, self._encode(words)), strict=True))
        kept = {word: ids for word, ids in new.items() if len(word) <= MAX_WORD_CHARS}
        if len(self._known) + len(kept) > MAX_WORDS:
            self._known.clear()
        self._known.update(kept)
        return new


def cuts_at_words(tokenizer: Mapping[str, Any]) -> bool:
    """Of a `tokenizer.json`: whether the tokens of a text are those of its words, one after the
    other. False where that is not certain."""
    model, normalizer = tokenizer["model"], tokenizer.get("normalizer")
    parts = _parts(tokenizer.get("pre_tokenizer"))
    return (
        model.get("type") == "BPE"
        and not model.get("dropout")
        and (normalizer is None or normalizer["type"] == "NFC")
        and not tokenizer.get("added_tokens")
        and all(_is_understood(part) for part in parts)
        and any(_takes_words(part) for part in parts)
    )


def _parts(pre_tokenizer: Mapping[str, Any] | None) -> Sequence[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return list(pre_tokenizer["pretokenizers"])
    return [pre_tokenizer]


def _is_understood(part: Mapping[str, Any]) -> bool:
    if part["type"] == "Split":
        is_plain = part["behavior"] == "Isolated" and not part["invert"]
        return is_plain and set(_alternatives(part)) <= _UNDERSTOOD
    return part["type"] in ("ByteLevel", "Digits")


def _takes_words(part: Mapping[str, Any]) -> bool:
    if part["type"] == "Split":
        there = _alternatives(part)
        return not any(kind.isdisjoint(there) for kind in _NEEDED)
    return part["type"] == "ByteLevel" and part.get("use_regex", True) is True


def _alternatives(split: Mapping[str, Any]) -> list[str]:
    """Of its pattern; what is in brackets is one."""
    pattern = split["pattern"].get("Regex", "")
    inside, start, out = 0, 0, []
    for index, letter in enumerate(pattern):
        inside += (letter in "([{") - (letter in ")]}")
        if letter == "|" and not inside:
            out.append(pattern[start:index])
            start = index + 1
    return [*out, pattern[start:]]
