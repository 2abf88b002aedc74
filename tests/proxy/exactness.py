"""What the property tests of the proxy share: what a policy may say, and the check on records."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from areal_sub.proxy.sessions import Sampling, Session
from areal_sub.proxy.turns import Turns
from areal_sub.records import (
    Fork,
    GenerateChunk,
    GenerateRequest,
    IntentRecord,
    TurnRecord,
    decode_record,
)
from areal_sub.rpc import Last
from areal_sub.trajectory.journal import Journal, read_journal

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


class DirectEngine:
    """The stub as an `EngineClient`, without the socket between (another test's concern)."""

    is_connected = True

    def __init__(self, stub: Any) -> None:
        self._stub = stub

    async def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateChunk]:
        async for item in self._stub.generate(request.to_map()):
            yield GenerateChunk.from_map(item.item if isinstance(item, Last) else item)


def make_turns(engine: Any, renderer: Any, journal: Journal) -> Turns:
    return Turns(
        engine=DirectEngine(engine),  # type: ignore[arg-type]
        renderer=renderer,
        journal=journal,
        max_model_len=100_000,
        request_timeout_s=10,
    )


def make_session(max_new_tokens: int = 40) -> Session:
    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=1.0, top_p=1.0, top_k=0, override_agent=True
    )
    return Session(rollout_id="r", key="k", max_turns=10**6, sampling=sampling)


def check(path: Path, engine: Any) -> None:
    records = [decode_record(raw) for _, raw in read_journal(path)]
    turns = [record for record in records if isinstance(record, TurnRecord)]
    asked = [record.turn_id for record in records if isinstance(record, IntentRecord)]
    assert {turn.turn_id for turn in turns} <= set(asked) and len(asked) == len(set(asked))
    sequences: dict[str | None, list[int]] = {None: []}
    recorded = []
    for turn in turns:
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
