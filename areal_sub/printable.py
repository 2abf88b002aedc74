"""Text for a terminal: what agents and models wrote, harmless."""

from __future__ import annotations

import unicodedata

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
