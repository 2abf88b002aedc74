"""Values that are nearly JSON: Python's literals, and Gemma 4's.

Read by hand and with a bound on the depth: what a model writes is nobody's program, and Python's
own reader takes the stack that deep brackets ask for. A reader raises `ValueError` for whatever it
does not know.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from areal_sub.proxy.neutral import MAX_DEPTH

_SPACE = re.compile(r"\s*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?(?![\w.])")
_QUOTED = re.compile(
    r'"((?:[^"\\\n]|\\.)*)"'
    r"|'((?:[^'\\\n]|\\.)*)'"
)
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|(.))", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "0": "\0"}
MAX_DIGITS = 4000  # Python refuses to read longer integers; so do we, by name


class Reader:
    """Reads one value after the other from the start of `text`."""

    CONSTANTS: ClassVar[dict[str, Any]] = {"true": True, "false": False, "null": None}
    WORD: ClassVar[re.Pattern[str]] = re.compile(r"[A-Za-z_][\w.\-]*")

    def __init__(self, text: str) -> None:
        self._text = text
        self._position = 0
        self._depth = 0

    def at_end(self) -> bool:
        self._match(_SPACE)
        return self._position == len(self._text)

    def take(self, mark: str) -> bool:
        """Whether `mark` comes next; if so, step behind it."""
        self._match(_SPACE)
        if not self._text.startswith(mark, self._position):
            return False
        self._position += len(mark)
        return True

    def expect(self, mark: str) -> None:
        if not self.take(mark):
            raise ValueError(f"{mark!r} expected")

    def word(self) -> str:
        self._match(_SPACE)
        match = self._match(self.WORD)
        if match is None:
            raise ValueError("a name expected")
        return match[0]

    def value(self) -> Any:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError("nested too deep")
        try:
            if self.take("["):
                return self._list()
            if self.take("{"):
                return self.fields("}", ":")
            text = self._string()
            return self._scalar() if text is None else text
        finally:
            self._depth -= 1

    def fields(self, close: str, colon: str) -> dict[str, Any]:
        """Names and values up to `close`."""
        found: dict[str, Any] = {}
        while not self.take(close):
            if found:
                self.expect(",")
                if self.take(close):
                    break
            key = self._string()
            key = self.word() if key is None else key
            self.expect(colon)
            if key in found:
                raise ValueError(f"{key} is there twice")
            found[key] = self.value()
        return found

    def _list(self) -> list[Any]:
        found: list[Any] = []
        while not self.take("]"):
            if found:
                self.expect(",")
                if self.take("]"):
                    break
            found.append(self.value())
        return found

    def _string(self) -> str | None:
        self._match(_SPACE)
        match = self._match(_QUOTED)
        if match is None:
            return None
        return _ESCAPE.sub(_unescape, match[1] if match[1] is not None else match[2])

    def _scalar(self) -> Any:
        match = self._match(_NUMBER)
        if match is None:
            word = self.word()
            if word in self.CONSTANTS:
                return self.CONSTANTS[word]
            raise ValueError(f"{word} is no value")
        if len(match[0]) > MAX_DIGITS:
            raise ValueError("a number too long")
        return float(match[0]) if match[1] or match[2] else int(match[0])

    def _match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        match = pattern.match(self._text, self._position)
        if match is not None:
            self._position = match.end()
        return match


class PythonReader(Reader):
    CONSTANTS: ClassVar[dict[str, Any]] = {
        **Reader.CONSTANTS,
        "True": True,
        "False": False,
        "None": None,
    }


class GemmaReader(Reader):
    """Strings stand between `<|"|>`, as they are."""

    QUOTE: ClassVar[str] = '<|"|>'
    WORD: ClassVar[re.Pattern[str]] = re.compile(
        r"[^:,{}\[\]<>\s](?:[^:,{}\[\]<>]*[^:,{}\[\]<>\s])?"
    )

    def _string(self) -> str | None:
        if not self.take(self.QUOTE):
            return None
        stop = self._text.find(self.QUOTE, self._position)
        if stop < 0:
            raise ValueError("a string without end")
        found = self._text[self._position : stop]
        self._position = stop + len(self.QUOTE)
        return found


def _unescape(match: re.Match[str]) -> str:
    code = match[1] or match[2]
    if code:
        return chr(int(code, 16))
    return _ESCAPED.get(match[3], match[3])
