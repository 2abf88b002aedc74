"""Chat completions through the real OpenAI SDK, over real sockets."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import openai
import pytest

from areal_sub.records import EndRecord, Fork, OpenRecord, TurnRecord

CALC = {"type": "function", "function": {"name": "calc", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "calc", "arguments": {"a": 7, "b": 8}}\n</tool_call>'


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def test_one_turn(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says("56<|im_end|>")
        proxy.engine.policy_version = 3
        rollout = await proxy.open()
        async with rollout.client() as client:
            answer = await client.chat.completions.create(
                model="gpt-4o", messages=[{"role": "system", "content": "Be brief."}, user("7*8?")]
            )
        assert answer.model == "gpt-4o"
        assert answer.choices[0].message.content == "56"
        assert answer.choices[0].finish_reason == "stop"
        [request], [sampled] = proxy.engine.requests, proxy.engine.sampled
        assert request.stream is False
        assert request.affinity == rollout.rollout_id
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(request.prompt_token_ids)
        assert answer.usage.completion_tokens == len(sampled)
        assert await rollout.end(reward=0.5) == {"outcome": "completed", "num_turns": 1}
        opened, _, turn, end = proxy.records()
        assert isinstance(opened, OpenRecord)
        assert isinstance(end, EndRecord)
        assert (end.written_bytes, end.peak_memory_bytes) == (4096, 8192)
        assert (turn.turn_id, turn.parent_turn_id, turn.fork) == (answer.id, None, Fork.ROOT)
        assert turn.context_token_ids.tolist() == request.prompt_token_ids.tolist()
        assert turn.token_ids.tolist() == sampled
        assert np.allclose(turn.rollout_logprobs, [-0.5 - i / 1000 for i in sampled])
        assert turn.versions.tolist() == [3] * len(sampled)
        assert (turn.finish_reason, turn.model, turn.dialect) == ("stop", "gpt-4o", "chat")
        assert (end.reward, end.num_turns, end.num_rejected_calls) == (0.5, 1, 0)

    proxied(work)


def test_tool_turns_share_their_prefix_and_keep_the_separators(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says(f"I compute.\n{CALL}\n{CALL}<|im_end|>", "It is 56.<|im_end|>")
        rollout = await proxy.open()
        messages: list[Any] = [user("7*8?")]
        async with rollout.client() as client:
            first = await client.chat.completions.create(
                model="m", messages=messages, tools=[CALC], tool_choice="auto"
            )
            choice = first.choices[0]
            assert choice.finish_reason == "tool_calls"
            assert choice.message.content == "I compute."
            calls = choice.message.tool_calls
            assert calls is not None
            assert [json.loads(call.function.arguments) for call in calls] == [{"a": 7, "b": 8}] * 2
            assert len({call.id for call in calls}) == 2
            # With all its nulls, as SDKs send it back, and with the arguments spelled otherwise.
            said = choice.message.model_dump()
            said["tool_calls"][0]["function"]["arguments"] = '{"b":8,"a":7}'
            messages += [said]
            messages += [
                {"role": "tool", "tool_call_id": call.id, "content": "56"} for call in calls
            ]
            await client.chat.completions.create(model="m", messages=messages, tools=[CALC])
        one, two = rollout.turns()
        assert (two.parent_turn_id, two.fork) == (one.turn_id, Fork.NONE)
        decode = proxy.engine.vocabulary.decode
        assert decode(two.context_token_ids) == (
            "\n<|im_start|>user\n<tool_response>\n56\n</tool_response>"
            "\n<tool_response>\n56\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        )
        await rollout.end()
        trajectory = rollout.trajectory()
        prompt = proxy.engine.requests[1].prompt_token_ids.tolist()
        assert trajectory.sequence(two.turn_id).tolist() == prompt + proxy.engine.sampled[1]
        assert prompt[: len(proxy.engine.requests[0].prompt_token_ids)] == (
            proxy.engine.requests[0].prompt_token_ids.tolist()
        )

    proxied(work)


def test_calls_are_content_where_malformed_or_not_asked_for(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        malformed = "<tool_call>\n{'name': calc}\n</tool_call>"
        proxy.engine.says(f"{malformed}<|im_end|>", f"{CALL}<|im_end|>", f"{CALL}<|im_end|>")
        rollout = await proxy.open()
        async with rollout.client() as client:
            create = client.chat.completions.create
            for tools, choice, expected in (
                ([CALC], "auto", malformed),
                ([CALC], "none", CALL),
                (openai.omit, openai.omit, CALL),
            ):
                answer = await create(
                    model="m", messages=[user("?")], tools=tools, tool_choice=choice
                )
                assert answer.choices[0].message.content == expected
                assert answer.choices[0].message.tool_calls is None
                assert answer.choices[0].finish_reason == "stop"

    proxied(work)


def test_streaming_text_calls_and_usage(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says(f"Größe 😀 is:\n{CALL}<|im_end|>")
        rollout = await proxy.open()
        text, finish, usage, roles = "", None, None, []
        arguments: dict[int, str] = {}
        async with rollout.client() as client:
            stream = await client.chat.completions.create(
                model="m",
                messages=[user("7*8?")],
                tools=[CALC],
                stream=True,
                stream_options={"include_usage": True},
            )
            async for chunk in stream:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    text += choice.delta.content or ""
                    roles += [choice.delta.role] if choice.delta.role else []
                    finish = choice.finish_reason or finish
                    for call in choice.delta.tool_calls or []:
                        arguments.setdefault(call.index, "")
                        arguments[call.index] += call.function.arguments
        assert text == "Größe 😀 is:"
        assert roles == ["assistant"]
        assert {i: json.loads(a) for i, a in arguments.items()} == {0: {"a": 7, "b": 8}}
        assert finish == "tool_calls"
        assert usage is not None
        assert usage.prompt_tokens == len(proxy.engine.requests[0].prompt_token_ids)
        assert usage.completion_tokens == len(proxy.engine.sampled[0])
        assert proxy.engine.requests[0].stream is True

    proxied(work)


@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_aborts_the_generation_and_records_what_was_sampled(
    proxied: Any, stream: bool
) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says("abc<|im_end|>")
        reached, never = asyncio.Event(), asyncio.Event()

        async def gate(position: int) -> None:
            if position == (2 if stream else 0):
                reached.set()
                await never.wait()

        proxy.engine.gate = gate
        rollout = await proxy.open()
        client = rollout.client()
        asking = asyncio.ensure_future(_read_all(client, stream))
        await reached.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await client.close()
        await proxy.engine.until(lambda: proxy.engine.num_aborted == 1)
        ended = await rollout.end()
        if stream:
            [turn] = rollout.turns()
            assert turn.finish_reason == "aborted"
            assert turn.token_ids.tolist() == proxy.engine.sampled[0][:2]
            assert ended == {"outcome": "completed", "num_turns": 1}
        else:
            assert ended == {"outcome": "no_turns", "num_turns": 0}
        assert (await proxy.stats())["num_aborted"] == 1

    proxied(work)


async def _read_all(client: openai.AsyncOpenAI, stream: bool) -> None:
    answer = await client.chat.completions.create(model="m", messages=[user("?")], stream=stream)  # type: ignore[call-overload]
    if stream:
        async for _ in answer:
            pass


def test_n_choices_are_siblings_and_share_a_reward(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says(*[f"{text}<|im_end|>" for text in ("a", "b", "c", "d")])
        rollout = await proxy.open()
        async with rollout.client() as client:
            answer = await client.chat.completions.create(model="m", messages=[user("?")], n=3)
            texts = {choice.index: choice.message.content for choice in answer.choices}
            assert sorted(texts) == [0, 1, 2]
            followed = {"role": "assistant", "content": texts[2]}
            messages: list[Any] = [user("?"), followed, user("and?")]
            last = await client.chat.completions.create(model="m", messages=messages)
        turns = {turn.turn_id: turn for turn in rollout.turns()}
        ids = [answer.id, f"{answer.id}-1", f"{answer.id}-2"]
        assert list(turns) == [*ids, last.id] or set(turns) == {*ids, last.id}
        assert sorted(turns[i].fork for i in ids) == [Fork.RESAMPLE, Fork.RESAMPLE, Fork.ROOT]
        assert len({tuple(turns[i].context_token_ids) for i in ids}) == 1
        assert turns[last.id].parent_turn_id == f"{answer.id}-2"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == sum(len(turns[i].token_ids) for i in ids)
        await rollout.end(reward=None, turn_rewards={answer.id: 0.25, f"{answer.id}-1": 1.0})
        end = proxy.records()[-1]
        assert end.turn_rewards == {ids[0]: 0.25, ids[1]: 1.0, ids[2]: 0.25}

    proxied(work)


def test_streamed_choices_arrive_under_their_index(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says("aa<|im_end|>", "bb<|im_end|>")
        rollout = await proxy.open()
        texts = ["", ""]
        async with rollout.client() as client:
            stream = await client.chat.completions.create(
                model="m", messages=[user("?")], n=2, stream=True
            )
            async for chunk in stream:
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
        assert sorted(texts) == ["aa", "bb"]

    proxied(work)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_cuts_the_text_and_the_record_ends_with_its_token(
    proxied: Any, stream: bool
) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says("one STOP two three<|im_end|>", "four<|im_end|>")
        rollout = await proxy.open()
        async with rollout.client() as client:
            create = client.chat.completions.create
            if stream:
                text = ""
                async for chunk in await create(
                    model="m", messages=[user("?")], stop=["STOP", "never"], stream=True
                ):
                    text += chunk.choices[0].delta.content or ""
            else:
                answer = await create(model="m", messages=[user("?")], stop="STOP")
                assert answer.choices[0].finish_reason == "stop"
                text = answer.choices[0].message.content or ""
            assert text == "one "
            await proxy.engine.until(lambda: proxy.engine.num_running == 0)
            said = {"role": "assistant", "content": text}
            await create(model="m", messages=[user("?"), said, user("go on")])
        one, two = rollout.turns()
        decode = proxy.engine.vocabulary.decode
        assert decode(one.token_ids) == "one STOP"
        # What was not sampled, the end of the turn, is context.
        assert two.parent_turn_id == one.turn_id
        assert decode(two.context_token_ids).startswith("<|im_end|>\n<|im_start|>user\ngo on")

    proxied(work)


def test_length_and_its_continuation(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says("abcdef<|im_end|>", "ok<|im_end|>")
        rollout = await proxy.open(max_new_tokens=5)
        async with rollout.client() as client:
            create = client.chat.completions.create
            answer = await create(
                model="m", messages=[user("?")], max_completion_tokens=3, max_tokens=9
            )
            assert answer.choices[0].finish_reason == "length"
            content = answer.choices[0].message.content
            said = {"role": "assistant", "content": content}
            await create(model="m", messages=[user("?"), said, user("more")], max_tokens=10**9)
        assert [request.max_new_tokens for request in proxy.engine.requests] == [3, 5]
        one, two = rollout.turns()
        assert one.finish_reason == "length"
        decode = proxy.engine.vocabulary.decode
        assert decode(two.context_token_ids).startswith("<|im_end|>\n<|im_start|>user\nmore")

    proxied(work)


def test_sampling_is_the_runs_or_the_agents(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        asked = {"temperature": 0.2, "top_p": 0.3, "extra_body": {"top_k": 7}}
        for override in (True, False):
            rollout = await proxy.open(temperature=1.0, top_p=0.9, override_agent=override)
            async with rollout.client() as client:
                for parameters in (asked, {}):
                    await client.chat.completions.create(
                        model="m", messages=[user("?")], **parameters
                    )
        got = [(r.temperature, r.top_p, r.top_k) for r in proxy.engine.requests]
        ours = (1.0, 0.9, 0)
        assert got == [ours, ours, (0.2, 0.3, 7), ours]
        assert isinstance(turn := proxy.records()[2], TurnRecord)
        assert turn.temperature == 1.0

    proxied(work)


def test_next_to_no_temperature_is_none(proxied: Any) -> None:
    """Divided by it, logits are no numbers any more: the engine would fail, for the agent."""

    async def work(proxy: Any) -> None:
        rollout = await proxy.open(override_agent=False)
        async with rollout.client() as client:
            for temperature in (0.01, 1e-40):
                await client.chat.completions.create(
                    model="m", messages=[user("?")], temperature=temperature
                )
        assert [r.temperature for r in proxy.engine.requests] == [0.01, 0.0]

    proxied(work)


def test_logprobs(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says("hi<|im_end|>")
        rollout = await proxy.open()
        async with rollout.client() as client:
            answer = await client.chat.completions.create(
                model="m", messages=[user("?")], logprobs=True
            )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        [turn] = rollout.turns()
        assert np.allclose([t.logprob for t in logprobs.content], turn.rollout_logprobs)
        assert logprobs.content[-1].token == "<|im_end|>"

    proxied(work)


def test_concurrent_calls_of_one_rollout(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        async with rollout.client() as client:
            await asyncio.gather(
                *(
                    client.chat.completions.create(model="m", messages=[user(f"task {i % 4}")])
                    for i in range(16)
                )
            )
        turns = rollout.turns()
        assert len(turns) == 16
        forks = [turn.fork for turn in turns]
        assert forks.count(Fork.RESAMPLE) == 12
        assert forks.count(Fork.ROOT) == 1

    proxied(work)


def test_the_sync_sdk_and_other_ways_to_give_the_key(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open()

        def ask(base: str, key: str, headers: dict[str, str]) -> str | None:
            url = proxy.url + base
            with openai.OpenAI(
                base_url=url, api_key=key, default_headers=headers, max_retries=0
            ) as client:
                assert client.models.list().data
                assert client.models.retrieve("org/any-name").id == "org/any-name"
                answer = client.chat.completions.create(model="m", messages=[user("?")])
                return answer.choices[0].message.content

        key = rollout.key
        for base, bearer, headers in (
            ("/v1", key, {}),
            ("", key, {}),
            ("/v1", "sk-hard-coded", {"x-api-key": key}),
            (f"/k/{key}/v1", "sk-hard-coded", {}),
            (f"/k/{key}", key, {}),
            ("/v1beta/openai/", key, {}),
            (f"/k/{key}/openai/v1/", "azure's", {}),
        ):
            assert await asyncio.to_thread(ask, base, bearer, headers) == "ok"
        assert (await rollout.end())["num_turns"] == 7

    proxied(work)


def test_azures_client_is_answered_where_it_asks(proxied: Any) -> None:
    """Below the host's address. Its key is in a header of its own, which says nothing here."""

    async def work(proxy: Any) -> None:
        proxy.engine.says("ok<|im_end|>")
        rollout = await proxy.open()
        async with openai.AsyncAzureOpenAI(
            azure_endpoint=f"{proxy.url}/k/{rollout.key}",
            api_version="2024-10-21",
            api_key="azure's",
            max_retries=0,
        ) as client:
            answer = await client.chat.completions.create(model="gpt-4o", messages=[user("?")])
            assert (answer.model, answer.choices[0].message.content) == ("gpt-4o", "ok")
            response = await client.responses.create(model="gpt-4o", input="?")
            assert response.output_text == "ok"
        assert [turn.dialect for turn in rollout.turns()] == ["chat", "responses"]

    proxied(work)
