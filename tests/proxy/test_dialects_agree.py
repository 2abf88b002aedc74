"""One conversation through any dialects, turn by turn: one tree, and nothing but what was sampled.

Also a property: whatever the agent does between its turns.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from exactness import ENDS, REPLIES, TEXTS, check, make_session, make_turns
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wires import WIRES, Responses, Said

from areal_sub.proxy.neutral import Choice, Thought, ToolCall, Usage
from areal_sub.records import Fork
from areal_sub.trajectory.journal import Journal

MOVES = st.lists(
    st.tuples(
        st.sampled_from(
            ["go on"] * 6 + ["repeat", "edit user", "edit assistant", "drop", "tools", "forget"]
        ),
        st.sampled_from(WIRES),
        TEXTS,
        st.booleans(),  # starts with a thought
        REPLIES,
        ENDS,
        st.booleans(),  # stream
        st.sampled_from([None, None, "o", "im"]),  # stop string
    ),
    min_size=2,
    max_size=6,
)


@pytest.mark.parametrize("thinks", [False, True])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=MOVES)
def test_whatever_dialects_an_agent_speaks(
    new_stub: Any, renderers: Any, thinks: bool, moves: list[Any]
) -> None:
    renderer = renderers["reasoning" if thinks else "plain"]

    async def work(folder: Path) -> None:
        engine = new_stub(renderer.vocabulary)
        journal = Journal(folder / "journal")
        turns = make_turns(engine, renderer, journal)
        session = make_session()
        said: list[Said] = []
        tools = True
        for number, (move, wire, text, thought, reply, end, stream, stop) in enumerate(moves):
            before = len(said)
            said, tools = change(said, tools, move, text)
            engine.says(("<think>\nhm\n</think>\n" if thought else "") + reply + end or "x")
            more = {"stop": [stop]} if stop and not isinstance(wire, Responses) else {}
            asked = wire.asked(said, tools, stream, **more)
            call = wire.dialect.parse(replace(asked, seen=session.seen))
            assert call.messages == wire.dialect.parse(asked).messages
            prepared = await turns.prepare(session, call, f"resp_{number}")
            whole, wired = Choice(), wire.dialect.stream(f"resp_{number}", call, 1)
            raw = b""
            async for index, delta in turns.run(prepared):
                whole.add(delta)
                raw += b"".join(wired.events(index, delta))
            usage = Usage(prepared.prompt.num_tokens, prepared.num_sampled_tokens)
            raw += wired.end(usage)
            answer = wire.dialect.answer(prepared.answer_id, call, [whole], usage)
            parts = wire.said(answer)
            # Chat has no order of text and calls, and streams what it has.
            assert facts(wire.streamed(raw)) == facts(parts) == facts(whole.parts)
            if move == "go on" and before:
                assert prepared.prompt.parent is not None
                assert prepared.prompt.fork in (Fork.NONE, Fork.RESAMPLE)
            said = [*said, ("assistant", parts)]
        journal.close()
        check(folder / "journal", engine)

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(work(Path(folder)))


def facts(parts: Any) -> Any:
    whole = Choice(list(parts))
    calls = [(call.id, call.name, json.loads(call.arguments)) for call in whole.tool_calls]
    return whole.reasoning, whole.text, calls


def change(said: list[Said], tools: bool, move: str, text: str) -> tuple[list[Said], bool]:
    last = said[-1] if said else None
    if last is None:
        return [("user", text)], tools
    if move == "repeat":
        return said[:-1], tools
    if move == "edit user":
        said = [("user", text), *said[1:]]
    if move == "edit assistant":
        said = [*said[:-1], ("assistant", [text])]
    if move == "forget":  # the reasoning
        parts = [part for part in last[1] if not isinstance(part, Thought)]
        said = [*said[:-1], ("assistant", parts)]
    if move == "drop" and len(said) > 2:
        said = [said[0], *said[2:]]
    if move == "tools":
        tools = not tools
    calls = [part for part in said[-1][1] if isinstance(part, ToolCall)]
    return [*said, *(("tool", call, text) for call in calls), ("user", text)], tools
