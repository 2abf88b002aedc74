"""Whatever an agent does, what is recorded is what the engine saw and sampled. Also a property."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from areal_sub.proxy.dialects import Asked, chat
from areal_sub.proxy.neutral import Choice
from areal_sub.proxy.refusals import Refusal
from areal_sub.proxy.sessions import Sampling, Session
from areal_sub.proxy.turns import Turns
from areal_sub.records import Fork, GenerateChunk, GenerateRequest, TurnRecord, decode_record
from areal_sub.trajectory.journal import Journal, read_journal

TOOLS = [{"type": "function", "function": {"name": "calc", "parameters": {"type": "object"}}}]

# What a policy may say: text, calls, half calls, control tokens as text and as tokens, bad UTF-8.
REPLIES = st.lists(
    st.one_of(
        st.sampled_from(
            [
                '<tool_call>\n{"name": "calc", "arguments": {"a": 1}}\n</tool_call>',
                "<tool_call>\n{broken}\n</tool_call>",
                "<tool_call>",
                "<think>hm</think>",
                " \n",
                "<|im_start|>",
                "Größe 😀",
            ]
        ),
        st.text(max_size=8),
    ),
    max_size=4,
).map("".join)
ENDS = st.sampled_from(["<|im_end|>", "<|im_end|>", "<|endoftext|>", ""])
TEXTS = st.one_of(
    st.text(max_size=10), st.sampled_from(["<|im_end|>", "<|im_start|>system\n", "{{ x }}", ""])
)
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


class DirectEngine:
    """The stub as an `EngineClient`, without the socket between (another test's concern)."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub

    async def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateChunk]:
        async for item in self._stub.generate(request.to_map()):
            yield GenerateChunk.from_map(item)


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


def make_turns(engine: Any, renderer: Any, journal: Journal) -> Turns:
    return Turns(
        engine=DirectEngine(engine),  # type: ignore[arg-type]
        renderer=renderer,
        journal=journal,
        max_model_len=100_000,
        request_timeout_s=10,
    )


def make_session() -> Session:
    sampling = Sampling(max_new_tokens=40, temperature=1.0, top_p=1.0, top_k=0, override_agent=True)
    return Session(rollout_id="r", key="k", max_turns=10**6, sampling=sampling)


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


def check(path: Path, engine: Any) -> None:
    turns = [decode_record(raw) for _, raw in read_journal(path)]
    sequences: dict[str | None, list[int]] = {None: []}
    recorded = []
    for turn in turns:
        assert isinstance(turn, TurnRecord)
        prompt = sequences[turn.parent_turn_id] + turn.context_token_ids.tolist()
        assert len(prompt) == turn.num_prompt_tokens
        sequences[turn.turn_id] = prompt + turn.token_ids.tolist()
        recorded.append((tuple(prompt), tuple(turn.token_ids.tolist())))
        assert len(turn.token_ids) == len(turn.rollout_logprobs) == len(turn.versions)
        if turn.fork in (Fork.ROOT, Fork.TEMPLATE_REWROTE, Fork.TOOLS_CHANGED):
            assert turn.parent_turn_id is None
        if turn.fork is Fork.NONE:
            assert turn.parent_turn_id is not None
    # With a stop string the engine may be a token ahead of what was taken when it is aborted.
    saw = sorted(
        (tuple(request.prompt_token_ids.tolist()), tuple(sampled))
        for request, sampled in zip(engine.requests, engine.sampled, strict=True)
        if sampled
    )
    assert len(saw) == len(recorded)
    for (prompt, tokens), (seen_prompt, seen_tokens) in zip(sorted(recorded), saw, strict=True):
        assert prompt == seen_prompt
        assert seen_tokens[: len(tokens)] == tokens
