"""Text for a terminal: what agents and models wrote, harmless; and tokens as text."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Controls, invisible and direction-changing marks, surrogates, private and unassigned characters,
# line and paragraph separators.
_ESCAPED = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def escaped(text: str) -> str:
    """`text` with everything escaped that a terminal would obey or hide, save newlines and tabs."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) not in _ESCAPED else _escape(char)
        for char in text
    )


def one_line(text: str) -> str:
    return escaped(text).replace("\n", "\\n").replace("\t", "\\t")


def _escape(char: str) -> str:
    code = ord(char)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class Decoder:
    """Token ids as text, where a tokenizer is at hand."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """The first of `folders` that has a usable `tokenizer.json` is taken."""
        self._tokenizer: Any = None
        for folder in folders:
            if self._tokenizer is None and (folder / "tokenizer.json").is_file():
                self._tokenizer = _load(folder / "tokenizer.json")

    @property
    def is_there(self) -> bool:
        return self._tokenizer is not None

    def text(self, token_ids: Any) -> str | None:
        """Control tokens included. None without a tokenizer."""
        if self._tokenizer is None:
            return None
        text: str = self._tokenizer.decode(list(map(int, token_ids)), skip_special_tokens=False)
        return text


def _load(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception:  # the library raises bare Exceptions; tokens are shown as numbers then
        return None
