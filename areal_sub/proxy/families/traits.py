"""What a chat template does to a conversation, found by asking it.

Templates refuse, drop and rewrite things, each in its own way; what follows from that (an answer
with one call only, a warning that tools are not shown, a fork) follows from what the template does,
not from the name of its family. Pure; called once when a proxy starts, and by the tests that check
the table in `docs/families.md`.
"""

from __future__ import annotations

from dataclasses import dataclass

from areal_sub.proxy.history import message_hash
from areal_sub.proxy.neutral import Message, ToolCall
from areal_sub.proxy.render import Renderer
from areal_sub.proxy.template import RenderError

_SYSTEM = Message("system", "Zsystem")
_USER = Message("user", "Zuser")
_NEXT = Message("user", "Znext")
_TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "Ztool",
            "description": "Does something.",
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "integer", "description": "A number."}},
                "required": ["x"],
            },
        },
    },
)


def _calls(*values: int) -> tuple[ToolCall, ...]:
    return tuple(ToolCall(f"call0000{v}", "Ztool", f'{{"x": {v}1111}}') for v in values)


def _results(*values: int) -> list[Message]:
    return [Message("tool", f"Zresult{v}", tool_call_id=f"call0000{v}") for v in values]


@dataclass(frozen=True, slots=True)
class Traits:
    takes_system: bool  # shows a system message
    takes_tools: bool  # shows the tools that may be called
    takes_calls: bool  # shows an earlier call, and its result
    reads_calls: bool  # what it shows of a call is what the format's parser reads
    takes_parallel_calls: bool  # shows all calls of an earlier answer
    keeps_reasoning: bool  # shows what was thought before a call, while it is worked on
    keeps_old_reasoning: bool  # shows what was thought before the last user message


def traits_of(renderer: Renderer) -> Traits:
    def shows(what: list[str], messages: list[Message]) -> bool:
        try:
            ids = renderer.prompt(messages, _TOOLS)
        except RenderError:
            return False
        text = renderer.vocabulary.decode(ids)
        return all(part in text for part in what)

    def reads(answer: Message) -> bool:
        try:
            read = renderer.read_back([_USER, answer, *_results(1)], _TOOLS, 2)
        except RenderError:
            return False
        return read is not None and message_hash(read) == message_hash(answer)

    called = Message("assistant", "", _calls(1))
    thought = Message("assistant", "", _calls(1), reasoning="Zthought")
    return Traits(
        takes_system=shows(["Zsystem"], [_SYSTEM, _USER]),
        takes_tools=shows(["Ztool"], [_USER]),
        takes_calls=shows(["11111", "Zresult1"], [_USER, called, *_results(1)]),
        reads_calls=reads(called),
        takes_parallel_calls=shows(
            ["11111", "21111", "Zresult1", "Zresult2"],
            [_USER, Message("assistant", "", _calls(1, 2)), *_results(1, 2)],
        ),
        keeps_reasoning=shows(["Zthought"], [_USER, thought, *_results(1)]),
        keeps_old_reasoning=shows(
            ["Zthought"],
            [_USER, thought, *_results(1), Message("assistant", "Zsaid"), _NEXT],
        ),
    )
