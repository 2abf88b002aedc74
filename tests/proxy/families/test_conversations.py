"""Whatever models of each family say, what is recorded is what the engine saw and sampled."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from exactness import check, make_session, make_turns
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_families import TOOLS, Family

from areal_sub.proxy.neutral import Call, Choice, Message, ToolCall
from areal_sub.proxy.refusals import Refusal
from areal_sub.proxy.render import Renderer
from areal_sub.records import Fork
from areal_sub.trajectory.journal import Journal

CALLS = (ToolCall("Abc123xyZ", "calc", '{"a": 7}'), ToolCall("Abc123xyQ", "f", '{"x": ["]}"]}'))
SAID = [
    Message("assistant", "Well…"),
    Message("assistant", "", CALLS[:1]),
    Message("assistant", "So: ", CALLS),
    Message("assistant", "", CALLS, reasoning="hm\n"),
    Message("assistant", "Yes.", reasoning="hm"),
]
STEPS = st.lists(
    st.tuples(
        st.lists(st.one_of(st.integers(0, 99), st.text(max_size=5)), max_size=4),  # what is said
        st.sampled_from(["call", "turn", "", "other"]),  # how it ends
        st.sampled_from(["keep", "keep", "keep", "drop reasoning", "edit"]),
        st.text(max_size=5),
        st.booleans(),  # stream
    ),
    min_size=2,
    max_size=5,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_records_are_what_was_sampled(
    new_stub: Any, family: Family, renderer: Renderer, steps: list[Any]
) -> None:
    tags = sorted(renderer.vocabulary.control_ids)
    fragments = [*map(family.writes, SAID), *map(family.writes, SAID), *tags]

    async def work(folder: Path) -> None:
        engine = new_stub(renderer.vocabulary)
        journal = Journal(folder / "journal")
        turns, session = make_turns(engine, renderer, journal), make_session(250)
        messages: list[Message] = []
        for number, (parts, end, move, text, stream) in enumerate(steps):
            last = messages[-1] if messages else None
            results = (
                [Message("tool", text, tool_call_id=c.id) for c in last.tool_calls] if last else []
            )
            messages += results or [Message("user", text)]
            ends = {"call": family.end_of_calls, "turn": family.end, "other": tags[-1], "": ""}
            said = [p if isinstance(p, str) else fragments[p % len(fragments)] for p in parts]
            engine.says("".join(said) + ends[end] or "x")
            call = Call(
                dialect="chat", model="m", messages=tuple(messages), tools=TOOLS, stream=stream
            )
            try:
                prepared = await turns.prepare(session, call, f"id-{number}")
            except Refusal as refusal:
                assert refusal.status == 400  # by the template, in its words
                assert "chat template" in str(refusal)
                break
            assert prepared.prompt.fork in set(Fork) - {Fork.HISTORY_EDITED, Fork.SYSTEM_CHANGED}
            answer = Choice()
            async for _, delta in turns.run(prepared):
                answer.add(delta)
            message = answer.message()
            if move == "drop reasoning":
                message = replace(message, reasoning="")
            if move == "edit":
                message = replace(message, content=text)
            messages.append(message)
        journal.close()
        check(folder / "journal", engine)

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(asyncio.wait_for(work(Path(folder)), 30))
