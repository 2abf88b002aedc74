"""A model folder's tokenizer, with control tokens kept apart from text.

A control token (`<|im_end|>`, `<tool_call>`, …) is an added token that is special or at least not
white space. Two rules follow from there: control token *ids* come only from places that ask for
them (`encode` with a text whose control tokens are the template's own), and text that merely looks
like one is encoded as ordinary text (`encode_plain`).
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from areal_sub.errors import ModelError
from areal_sub.proxy.template import read_json, token_text
from areal_sub.proxy.words import Words, cuts_at_words

# The library's own threads would fight the event loop for the core that the proxy has.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Texts whose ids are kept: at most some 40 MB, whatever agents send.
NUM_REMEMBERED = 512
MAX_REMEMBERED_CHARS = 8192


class Vocabulary:
    def __init__(self, folder: Path) -> None:
        """Raises `ModelError` where `folder` has no usable `tokenizer.json` or no end of turn."""
        path = folder / "tokenizer.json"
        if not path.exists():
            raise ModelError(f"{folder} has no tokenizer.json; save a fast tokenizer there")
        data = read_json(path)
        try:
            self.full = _load(data)
        except Exception as error:  # the library raises bare Exceptions
            raise ModelError(f"{path} is not a tokenizer: {error}") from None
        added = data.get("added_tokens") or []
        control = [token for token in added if token["special"] or token["content"].strip()]
        plain_data = {**data, "post_processor": None}
        ordinary = [token for token in added if token not in control]
        plain_data["added_tokens"] = ordinary
        self._plain = _load(plain_data)
        self._words = Words(self._encode_each) if cuts_at_words(plain_data) else None
        # Without the control tokens before them, ordinary added tokens may get other ids.
        self._renumber = {
            plain_id: token["id"]
            for token in ordinary
            if (plain_id := self._plain.token_to_id(token["content"])) != token["id"]
        }
        self.control_ids: dict[str, int] = {token["content"]: token["id"] for token in control}
        self.special_texts = frozenset(t["content"] for t in control if t["special"])
        self.stop_ids: frozenset[int] = frozenset()
        self.stop_texts: tuple[str, ...] = ()
        self.add_stops(_stop_ids(folder, self.full))
        self.size: int = self.full.get_vocab_size()
        # No text of n characters has fewer than n / max_token_chars tokens.
        self.max_token_chars = max(map(len, self.full.get_vocab()))
        self._control_set = frozenset(self.control_ids.values())
        self._control = any_of(self.control_ids)
        self._remembered = functools.lru_cache(NUM_REMEMBERED)(self._encode_as_text)
        # Control tokens that swallow the white space before or behind them.
        self._eats_left = {token["content"] for token in control if token.get("lstrip")}
        self._eats_right = {token["content"] for token in control if token.get("rstrip")}

    def add_stops(self, token_ids: Iterable[int]) -> None:
        """Have these end a turn too. While loading only."""
        self.stop_ids = self.stop_ids.union(token_ids)
        self.stop_texts = tuple(t for t, i in self.control_ids.items() if i in self.stop_ids)

    def encode(self, text: str, reveal: Callable[[str], str] = str) -> list[int]:
        """Ids of a rendered text, whose control tokens are meant as such.

        `reveal(text)` is applied to each stretch between control tokens just before it is encoded.
        """
        ids: list[int] = []
        position = 0
        for match in self._control.finditer(text) if self._control else ():
            between, token = text[position : match.start()], match[0]
            if token in self._eats_left:
                between = between.rstrip()
            if between:
                ids += self.encode_plain(reveal(between))
            ids.append(self.control_ids[token])
            position = match.end()
            while token in self._eats_right and text[position : position + 1].isspace():
                position += 1
        if position < len(text):
            ids += self.encode_plain(reveal(text[position:]))
        return ids

    def encode_plain(self, text: str) -> Sequence[int]:
        """Ids of `text` as ordinary text, whatever it looks like. Never a control token."""
        # System prompts, tools and tasks come again with each rollout of a group.
        is_short = len(text) <= MAX_REMEMBERED_CHARS
        return self._remembered(text) if is_short else self._encode_as_text(text)

    def _encode_as_text(self, text: str) -> Sequence[int]:
        ids = self._encode_plain(text)
        if self._control_set.isdisjoint(ids):
            return ids
        # Some vocabularies hold control tokens as ordinary entries too: break their texts apart.
        assert self._control is not None
        parts = re.split(f"(?<=(?={self._control.pattern}).)", text, flags=re.DOTALL)
        ids = [token_id for part in parts for token_id in self._encode_plain(part)]
        if not self._control_set.isdisjoint(ids):
            raise ModelError("this tokenizer turns ordinary text into control tokens")
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        # What is longer is encoded without holding up other threads.
        if self._words is not None and len(text) <= MAX_REMEMBERED_CHARS:
            return self._words.ids(text)
        [ids] = self._encode_each([text])
        if self._renumber:
            ids = [self._renumber.get(token_id, token_id) for token_id in ids]
        return ids

    def _encode_each(self, texts: list[str]) -> list[list[int]]:
        # "Fast": without the offsets, which nobody asks for.
        encoded = self._plain.encode_batch_fast(texts, add_special_tokens=False)
        return [each.ids for each in encoded]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`, control tokens included."""
        text: str = self.full.decode(token_ids, skip_special_tokens=False)
        return text

    def hidden_ids(self, visible: Collection[str]) -> frozenset[int]:
        """Ids without a text for agents: ends of turn and special tokens, save `visible`."""
        special = {self.control_ids[text] for text in self.special_texts}
        shown = {self.control_ids.get(text) for text in visible}
        return frozenset((special | self.stop_ids) - shown)


def _load(data: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _stop_ids(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """Ends of turn: of the generation config, the model config and the tokenizer together."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        config = read_json(folder / name)
        eos = config.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id"))
        ids.update(i for i in (eos if isinstance(eos, list) else [eos]) if isinstance(i, int))
    text = token_text(read_json(folder / "tokenizer_config.json").get("eos_token"))
    if text is not None and (token_id := tokenizer.token_to_id(text)) is not None:
        ids.add(token_id)
    if not ids:
        raise ModelError(
            f"{folder} names no end-of-sequence token (eos_token_id in generation_config.json or "
            "config.json, eos_token in tokenizer_config.json)"
        )
    return frozenset(ids)


def any_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    """Matches any of `texts`, the longest where several match; None where there are none."""
    longest_first = sorted(texts, key=len, reverse=True)
    # One plain alternation: `re` skips to the characters that it can start with.
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
