"""Tokens as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


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
