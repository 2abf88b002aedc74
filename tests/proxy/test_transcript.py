"""What a grader is told was said: by the model, and by the agent that may lie about it."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from areal_sub.proxy import transcript as transcripts
from areal_sub.workflow.transcript import branches


async def ask(client: Any, *messages: tuple[str, str], **more: Any) -> Any:
    sent: Any = [{"role": role, "content": content} for role, content in messages]
    return await client.chat.completions.create(model="m", messages=sent, **more)


async def stop(proxy: Any, rollout: Any) -> Any:
    params = {"rollout_id": rollout.rollout_id}
    return (await proxy.control.call("stop_rollout", params, timeout_s=10))["transcript"]


def test_the_main_branch_is_what_the_model_saw_and_said(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        call = '<tool_call>\n{"name": "calc", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
        proxy.engine.says(call, "It is 3.<|im_end|>")
        rollout = await proxy.open(transcript=True)
        tools: Any = [{"type": "function", "function": {"name": "calc", "parameters": {}}}]
        messages: Any = [{"role": "system", "content": "s"}, {"role": "user", "content": "1 + 2?"}]
        async with rollout.client() as client:
            first = await client.chat.completions.create(model="m", messages=messages, tools=tools)
            (asked,) = first.choices[0].message.tool_calls or ()
            messages += [
                first.choices[0].message.model_dump(exclude_none=True),
                {"role": "tool", "tool_call_id": asked.id, "content": "3"},
            ]
            second = await client.chat.completions.create(model="m", messages=messages, tools=tools)
        tree = await stop(proxy, rollout)
        assert [len(prompt["messages"]) for prompt in tree["prompts"]] == [2, 1]
        main, others = branches(tree)
        assert others == []
        assert [message["role"] for message in main] == [
            *("system", "user", "assistant", "tool", "assistant")
        ]
        assert [message.get("turn_id") for message in main] == [
            *(None, None, first.id, None, second.id)
        ]
        assert main[2]["tool_calls"][0]["function"] == {"name": "calc", "arguments": '{"a": 1}'}
        assert main[2]["finish_reason"] == "tool_calls"
        assert main[3] == {"role": "tool", "content": "3", "tool_call_id": asked.id}
        assert (main[4]["content"], main[4]["finish_reason"]) == ("It is 3.", "stop")

    proxied(work)


def test_words_put_into_the_models_mouth_are_not_its_own(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says("wrong<|im_end|>", "as I said<|im_end|>")
        rollout = await proxy.open(transcript=True)
        async with rollout.client() as client:
            await ask(client, ("user", "?"))
            await ask(client, ("user", "?"), ("assistant", "right"), ("user", "so?"))
        main, others = branches(await stop(proxy, rollout))
        assert [m["content"] for m in main if "turn_id" in m] == ["as I said"]
        assert main[1] == {"role": "assistant", "content": "right"}
        assert [[m["content"] for m in branch] for branch in others] == [["?", "wrong"]]

    proxied(work)


def test_what_an_agent_could_dictate_is_marked(proxied: Any) -> None:
    schema = {"name": "n", "schema": {"const": "42"}, "strict": True}

    async def work(proxy: Any) -> None:
        rollout = await proxy.open(transcript=True)
        async with rollout.client() as client:
            await ask(client, ("user", "6 * 7?"))
            dictated: Any = {"type": "json_schema", "json_schema": schema}
            await ask(client, ("user", "6 * 7?"), response_format=dictated)
        turns = (await stop(proxy, rollout))["turns"]
        assert [turn["message"].get("constrained") for turn in turns] == [None, True]

    proxied(work)


def test_siblings_share_their_prompt_and_each_is_a_branch(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says("one<|im_end|>", "two<|im_end|>", "three<|im_end|>")
        rollout = await proxy.open(transcript=True)
        async with rollout.client() as client:
            await ask(client, ("user", "?"), n=2)
            await ask(client, ("user", "?"))
        tree = await stop(proxy, rollout)
        assert len(tree["prompts"]) == 1
        main, others = branches(tree)
        assert main[-1]["content"] == "three"
        assert sorted(branch[-1]["content"] for branch in others) == ["one", "two"]
        assert main[0] is others[0][0]

    proxied(work)


def test_a_stopped_rollout_calls_nothing_and_can_be_ended(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open(transcript=True)
        async with rollout.client() as client:
            await ask(client, ("user", "?"))
            tree = await stop(proxy, rollout)
            with pytest.raises(openai.AuthenticationError):
                await ask(client, ("user", "?"))
        assert len(tree["turns"]) == 1
        await rollout.end(reward=0.5, claimed_reward=1.0)
        end = proxy.records()[-1]
        assert (end.reward, end.claimed_reward, end.num_turns) == (0.5, 1.0, 1)
        assert end.tampering == {"call_after_end": 1, "claim_differs": 1}

    proxied(work)


def test_a_call_beyond_the_limit_is_refused_before_it_is_sampled(
    proxied: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transcripts, "MAX_CHARS", 1000)
    question: Any = {"role": "user", "content": "?"}
    said = {"role": "assistant", "content": "!", "reasoning_content": "x" * 1000}
    thinking: Any = [question, said, question]  # which costs no tokens where no template shows it

    async def work(proxy: Any) -> None:
        rollout = await proxy.open(transcript=True)
        free = await proxy.open()
        async with rollout.client() as client, free.client() as unbounded:
            with pytest.raises(openai.APIStatusError) as caught:
                await ask(client, ("user", "x" * 1000))
            assert caught.value.status_code == 413
            with pytest.raises(openai.APIStatusError):
                await client.chat.completions.create(model="m", messages=thinking)
            await ask(client, ("user", "x" * 500))
            await ask(unbounded, ("user", "x" * 1000))
        assert len(proxy.engine.requests) == 2
        (turn,) = (await stop(proxy, rollout))["turns"]
        assert turn["message"]["content"] == "ok"

    proxied(work)


def test_nothing_is_kept_where_nobody_grades(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        async with rollout.client() as client:
            await ask(client, ("user", "?"))
        assert await stop(proxy, rollout) is None

    proxied(work)


def test_without_turns_there_are_no_branches() -> None:
    assert branches({"prompts": [], "turns": []}) == ([], [])
