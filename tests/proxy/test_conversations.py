"""Where a conversation goes on and its tokens do not, the record says after which turn it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai

from areal_sub.records import Fork
from areal_sub.trajectory.causes import causes, main_branch

SUMMARY = "The user greeted, and was greeted back."


async def say(client: openai.AsyncOpenAI, messages: list[Any], model: str = "m") -> str:
    answer = await client.chat.completions.create(model=model, messages=messages)
    messages.append({"role": "assistant", "content": answer.choices[0].message.content})
    return answer.id


def test_a_summed_up_history_goes_on_and_a_title_does_not(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says("Hello<|im_end|>", "Greeting<|im_end|>", f"{SUMMARY}<|im_end|>", "ok")
        rollout = await proxy.open()
        system = {"role": "system", "content": "Be kind."}
        messages: list[Any] = [system, {"role": "user", "content": "Hi"}]
        async with rollout.client() as client:
            first = await say(client, messages)
            title = await say(client, [{"role": "user", "content": "Title it"}], model="small")
            messages.append({"role": "user", "content": "Sum it up."})
            second = await say(client, messages)
            short: list[Any] = [system, {"role": "user", "content": f"Before: {SUMMARY} Go on."}]
            third = await say(client, short)
        await rollout.end()
        whole = rollout.trajectory()
        assert whole.turns[third].continues_turn_id == second
        assert causes(whole) == {
            first: Fork.ROOT,
            title: Fork.SIDE_REQUEST,
            second: Fork.NONE,
            third: Fork.COMPACTED,
        }
        assert main_branch(whole) == {first, second, third}

    proxied(work)


def test_a_template_that_strips_thinking(proxied: Any, thinking_folder: Path) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says("<think>hm</think>Hello<|im_end|>", "ok<|im_end|>")
        rollout = await proxy.open()
        messages: list[Any] = [{"role": "user", "content": "Hi"}]
        async with rollout.client() as client:
            first = await say(client, messages)
            messages.append({"role": "user", "content": "More"})
            second = await say(client, messages)
        await rollout.end()
        whole = rollout.trajectory()
        turn = whole.turns[second]
        assert (turn.fork, turn.parent_turn_id) == (Fork.TEMPLATE_REWROTE, None)
        assert turn.continues_turn_id == first
        assert main_branch(whole) == {first, second}

    proxied(work, model=thinking_folder)


def test_a_stop_string_may_be_put_back(proxied: Any) -> None:
    """It was sampled, and cut: a closing tag that an agent writes again is where it was."""

    async def work(proxy: Any) -> None:
        proxy.engine.says("<code>f()</code>", "<code>g()</code>", "ok<|im_end|>")
        rollout = await proxy.open()
        messages: list[Any] = [{"role": "user", "content": "Hi"}]
        async with rollout.client() as client:
            for put_back in ("</code>", ""):
                answer = await client.chat.completions.create(
                    model="m", messages=messages, stop=["</code>"]
                )
                said = answer.choices[0].message.content
                messages += [
                    {"role": "assistant", "content": said + put_back},
                    {"role": "user", "content": "It says 1."},
                ]
            await say(client, messages)
        await rollout.end()
        assert [turn.fork for turn in rollout.turns()] == [Fork.ROOT, Fork.NONE, Fork.NONE]

    proxied(work)
