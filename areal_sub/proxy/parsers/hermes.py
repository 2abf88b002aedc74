"""The Hermes format, which Qwen2.5, Qwen3 and SmolLM use too.

    <tool_call>
    {"name": "calc", "arguments": {"a": 7, "b": 8}}
    </tool_call>

SmolLM2 writes a list of such objects between the tags. A closing tag within one of a call's strings
does not close it; only where nothing else does.
"""

from __future__ import annotations

import json
import re
from typing import Any, ClassVar

from areal_sub.proxy.decode import num_held
from areal_sub.proxy.parsers.calls import as_call, read_json
from areal_sub.proxy.parsers.pieces import CallSyntax, ParsedCall, Tag
from areal_sub.proxy.parsers.tagged import TaggedParser

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_STRING_OR_END = re.compile(f'"|{_CLOSE}')
_IN_STRING = re.compile(r'"|\\.', re.DOTALL)


def _before_arguments(name: str) -> tuple[str, ...]:
    written = json.dumps(name, ensure_ascii=False)
    return Tag(_OPEN), f'\n{{"name": {written}, "arguments": '


class HermesParser(TaggedParser):
    OPEN: ClassVar[str] = _OPEN
    CLOSE: ClassVar[str] = _CLOSE
    TAGS: ClassVar[tuple[str, ...]] = (OPEN, CLOSE)
    SYNTAX: ClassVar[CallSyntax] = CallSyntax(
        before=_before_arguments, after=("}\n", Tag(CLOSE)), between=("\n",)
    )

    def __init__(self) -> None:
        super().__init__()
        self._in_string = False  # at `_searched`

    def calls(self, body: str) -> list[ParsedCall]:
        try:
            written: Any = read_json(body)
        except ValueError:
            return []
        calls = [_call(item) for item in (written if isinstance(written, list) else [written])]
        return [call for call in calls if call is not None] if None not in calls else []

    def find_close(self) -> int:
        if self._is_whole:
            return super().find_close()
        text = self._text
        while match := (_IN_STRING if self._in_string else _STRING_OR_END).search(
            text, self._searched
        ):
            if match[0] == self.CLOSE:
                return match.start()
            self._searched = match.end()
            self._in_string ^= match[0] == '"'
        held = int(text.endswith("\\")) if self._in_string else num_held(text, self.CLOSE)
        self._searched = max(self._searched, len(text) - held)
        return -1

    def forget_search(self) -> None:
        super().forget_search()
        self._in_string = False


def _call(written: Any) -> ParsedCall | None:
    if not isinstance(written, dict):
        return None
    return as_call(written.get("name"), written.get("arguments"))
