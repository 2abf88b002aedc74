"""Whatever an agent does, what is recorded is what the engine saw and sampled. Also a property."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import orjson
import pytest
from exactness import ENDS, REPLIES, TEXTS, check, make_session, make_turns
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from areal_sub.proxy.dialects import Asked, chat
from areal_sub.proxy.neutral import Choice
from areal_sub.proxy.refusals import Refusal
from areal_sub.trajectory.journal import Journal, read_journal

TOOLS = [{"type": "function", "function": {"name": "calc", "parameters": {"type": "object"}}}]

# How an agent goes on: mostly as it should.
MOVES = st.lists(
    st.tuples(
        st.sampled_from(["go on"] * 6 + ["repeat", "edit user", "edit assistant", "drop", "tools"]),
        TEXTS,
        REPLIES,
        ENDS,
        st.booleans(),  # stream
        st.sampled_from([None, None, "o", "im"]),  # stop string
        st.integers(1, 3),  # n
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("template", ["plain", "thinking"])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=MOVES)
def test_records_are_what_the_engine_saw_and_sampled(
    new_stub: Any, renderers: Any, template: str, moves: list[Any]
) -> None:
    renderer = renderers[template]

    async def work(folder: Path) -> None:
        engine = new_stub(renderer.vocabulary)
        journal = Journal(folder / "journal")
        turns = make_turns(engine, renderer, journal)
        session = make_session()
        messages: list[Any] = []
        tools: Any = TOOLS
        for move, text, reply, end, stream, stop, n in moves:
            messages, tools = change(messages, tools, move, text)
            engine.says(reply + end or "x")
            body = {"messages": messages, "tools": tools, "stream": stream, "stop": stop, "n": n}
            call = chat.parse(Asked(orjson.dumps(body)))
            prepared = await turns.prepare(session, call, f"id-{len(session.turn_ids)}")
            choices = [Choice() for _ in range(n)]
            async for index, delta in turns.run(prepared):
                choices[index].add(delta)
            usage = chat.Usage(prepared.prompt.num_tokens, prepared.num_sampled_tokens)
            answer = orjson.loads(chat.answer(prepared.answer_id, call, choices, usage))
            messages = [*messages, answer["choices"][-1]["message"]]
        journal.close()
        check(folder / "journal", engine)

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(work(Path(folder)))


def test_a_call_that_is_ended_before_it_began_is_refused(
    new_stub: Any, renderers: Any, tmp_path: Path
) -> None:
    async def work() -> None:
        renderer = renderers["plain"]
        journal = Journal(tmp_path / "journal")
        turns = make_turns(new_stub(renderer.vocabulary), renderer, journal)
        session = make_session()
        call = chat.parse(Asked(b'{"messages": [{"role": "user", "content": "x"}]}'))
        deltas = turns.run(await turns.prepare(session, call, f"id-{len(session.turn_ids)}"))
        reading = asyncio.ensure_future(anext(deltas))
        await asyncio.sleep(0)  # the choice's task exists now, and has not run yet
        assert len(session.running) == 1
        await session.close()
        with pytest.raises(Refusal, match="ended"):
            await reading
        journal.close()
        assert list(read_journal(tmp_path / "journal")) == []

    asyncio.run(asyncio.wait_for(work(), 10))


def test_a_journal_that_fails_is_an_answer_not_a_hang(
    new_stub: Any, renderers: Any, tmp_path: Path
) -> None:
    async def work() -> None:
        renderer = renderers["plain"]
        journal = Journal(tmp_path / "journal")
        turns = make_turns(new_stub(renderer.vocabulary), renderer, journal)
        call = chat.parse(Asked(b'{"messages": [{"role": "user", "content": "x"}]}'))
        prepared = await turns.prepare(make_session(), call, "id")
        journal.close()
        with pytest.raises(Refusal, match="the proxy failed"):
            await anext(turns.run(prepared))

    asyncio.run(asyncio.wait_for(work(), 10))


def change(messages: list[Any], tools: Any, move: str, text: str) -> tuple[list[Any], Any]:
    last = messages[-1] if messages else None
    if move == "repeat" and last:
        return messages[:-1], tools
    if move == "edit assistant" and last:
        return [*messages[:-1], {"role": "assistant", "content": text}], tools
    if move == "edit user" and last:
        return [{"role": "user", "content": text}, *messages[1:]], tools
    if move == "drop" and len(messages) > 2:
        return [messages[0], *messages[2:]], tools
    if move == "tools" and last:
        return [*messages, {"role": "user", "content": text}], None if tools else TOOLS
    if last and last.get("tool_calls"):
        results = [
            {"role": "tool", "tool_call_id": call["id"], "content": text}
            for call in last["tool_calls"]
        ]
        return [*messages, *results], tools
    return [*messages, {"role": "user", "content": text}], tools
