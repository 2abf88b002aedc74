"""The Hermes format, which Qwen2.5, Qwen3 and SmolLM use too.

    <tool_call>
    {"name": "calc", "arguments": {"a": 7, "b": 8}}
    </tool_call>

SmolLM2 writes a list of such objects between the tags.
"""

from __future__ import annotations

from typing import Any, ClassVar

from areal_sub.proxy.parsers.calls import as_call, read_json
from areal_sub.proxy.parsers.pieces import ParsedCall
from areal_sub.proxy.parsers.tagged import TaggedParser


class HermesParser(TaggedParser):
    OPEN: ClassVar[str] = "<tool_call>"
    CLOSE: ClassVar[str] = "</tool_call>"
    TAGS: ClassVar[tuple[str, ...]] = (OPEN, CLOSE)

    def calls(self, body: str) -> list[ParsedCall]:
        try:
            written: Any = read_json(body)
        except ValueError:
            return []
        calls = [_call(item) for item in (written if isinstance(written, list) else [written])]
        return [call for call in calls if call is not None] if None not in calls else []


def _call(written: Any) -> ParsedCall | None:
    if not isinstance(written, dict):
        return None
    return as_call(written.get("name"), written.get("arguments"))
