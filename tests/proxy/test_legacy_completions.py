"""Legacy completions through the real OpenAI SDK: text and token ids as they are."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import openai
import pytest

from areal_sub.proxy.dialects import Asked, completions
from areal_sub.proxy.refusals import Refusal
from areal_sub.records import Fork


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
