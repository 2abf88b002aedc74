"""Legacy completions through the real OpenAI SDK: text and token ids as they are."""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from exactness import ENDS, REPLIES, TEXTS, check, make_session, make_turns
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from areal_sub.proxy.dialects import Asked, completions
from areal_sub.proxy.refusals import Refusal
from areal_sub.records import Fork
from areal_sub.trajectory.journal import Journal

# How an agent goes on: from the tokens that it has, from its text, from somewhere else.
MOVES = st.lists(
    st.tuples(
        st.sampled_from(["tokens", "tokens", "text", "repeat", "edit", "else"]),
        TEXTS,
        REPLIES,
        ENDS,
        st.booleans(),  # stream
        st.sampled_from([None, "o", "im"]),  # stop string
        st.integers(1, 3),  # n
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=MOVES)
def test_records_are_what_the_engine_saw_and_sampled(
    new_stub: Any, renderers: Any, moves: list[Any]
) -> None:
    renderer = renderers["plain"]
    encode = renderer.vocabulary.encode

    async def work(folder: Path) -> None:
        engine = new_stub(renderer.vocabulary)
        journal = Journal(folder / "journal")
        turns = make_turns(engine, renderer, journal)
        session = make_session()
        prompt: Any = "?"
        whole: list[int] = []  # the last call's prompt and what was sampled after it
        for move, text, reply, end, stream, stop, n in moves:
            if move == "tokens" and whole:
                prompt = [*whole, *encode(text)]
            elif move == "edit" and len(whole) > 1:
                prompt = [*whole[:-1], whole[-1] ^ 1]
            elif move == "text" and isinstance(prompt, str):
                prompt += text
            elif move != "repeat":
                prompt = text or "!"
            engine.says(reply + end or "x")
            body = {"prompt": prompt, "stream": stream, "stop": stop, "n": n}
            call = completions.parse(Asked(json.dumps(body).encode()))
            prepared = await turns.prepare(session, call, f"id-{len(session.turn_ids)}")
            async for _ in turns.run(prepared):
                pass
            whole = engine.requests[-1].prompt_token_ids.tolist() + engine.sampled[-1]
            asked = encode(prompt) if isinstance(prompt, str) else prompt
            assert engine.requests[-1].prompt_token_ids.tolist() == asked
        journal.close()
        check(folder / "journal", engine)

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(work(Path(folder)))


@pytest.mark.parametrize("stream", [False, True])
def test_text_and_what_goes_on_from_it_in_tokens(proxied: Any, stream: bool) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says("<think> 56 </think><|im_end|>", "ok<|im_end|>")
        rollout = await proxy.open()

        async def ask(prompt: Any, **asked: Any) -> tuple[str, Any, Any]:
            answer = await client.completions.create(model="m", prompt=prompt, **asked)
            return answer.choices[0].text, answer.choices[0].logprobs, answer

        async with rollout.client() as client:
            if stream:
                text = ""
                chunks = await client.completions.create(
                    model="m",
                    prompt="7*8?",
                    stream=True,
                    max_tokens=9,
                    stream_options={"include_usage": True},
                )
                async for chunk in chunks:
                    text += chunk.choices[0].text if chunk.choices else ""
                    usage = chunk.usage
            else:
                text, logprobs, answer = await ask("7*8?", max_tokens=9, logprobs=0)
                usage = answer.usage
                assert "".join(logprobs.tokens) == text + "<|im_end|>"
            assert text == "<think> 56 </think>"
            assert usage.completion_tokens == len(proxy.engine.sampled[0])
            ids = proxy.engine.requests[0].prompt_token_ids.tolist() + proxy.engine.sampled[0]
            more = proxy.engine.vocabulary.encode("<|im_start|>user")
            await ask([*ids, *more])
            await ask([[*ids, *more]])
            await ask("else")
        one, two, three, four = rollout.turns()
        assert one.dialect == "completions"
        assert one.turn_id.startswith("cmpl-")
        assert [turn.fork for turn in (one, two, three, four)] == [
            Fork.ROOT,
            Fork.NONE,
            Fork.RESAMPLE,
            Fork.NEW_CONVERSATION,
        ]
        assert two.parent_turn_id == one.turn_id
        assert np.array_equal(two.context_token_ids, more)
        assert proxy.engine.requests[1].max_new_tokens == 16

    proxied(work, reasoning_parser="think")


def test_errors(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        async with rollout.client(max_retries=3) as client:
            for prompt, code in (
                ("seven " * 100, "context_length_exceeded"),
                ([1] * 64, "context_length_exceeded"),
                ([1, -1], None),
                ([10**6], None),
            ):
                with pytest.raises(openai.BadRequestError) as caught:
                    await client.completions.create(model="m", prompt=prompt)  # type: ignore[arg-type]
                assert caught.value.code == code
        assert proxy.engine.requests == []

    proxied(work, max_model_len=64)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 3}, "logprobs"),
        ({"best_of": 4}, "best_of"),
    ],
)
def test_invalid_requests_name_the_field(change: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as caught:
        completions.parse(Asked(json.dumps({"prompt": "?"} | change).encode()))
    assert caught.value.param == param
