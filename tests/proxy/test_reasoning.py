"""Reasoning: parsed from the text, a part of the answer, and what comes of leaving it out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal_sub.errors import ConfigError
from areal_sub.proxy.families import choose
from areal_sub.proxy.parsers import ThinkParser
from areal_sub.records import Fork


def parse(*texts: str, prompt_end: str = "") -> tuple[str, str]:
    parser = ThinkParser(prompt_end)
    given = [*map(parser.feed, texts), parser.finish()]
    return "".join(r for r, _ in given), "".join(c for _, c in given)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ("", "")),
        (" plain ", ("", " plain ")),
        ("<think>\nhm, \n 7\n</think>\n\n56 ", ("hm, \n 7", "56 ")),
        ("\n<think></think>56", ("", "56")),
        ("<think>hm</thin", ("hm</thin", "")),
        ("<think> hm \n", ("hm", "")),
        ("<thi", ("", "<thi")),
        ("so <think>hm</think>", ("", "so <think>hm</think>")),
        ("<think>a</think>b<think>c</think>", ("a", "b<think>c</think>")),
    ],
)
def test_reasoning_is_what_is_in_front(text: str, expected: tuple[str, str]) -> None:
    assert parse(text) == expected
    assert parse(*text) == expected


def test_a_prompt_that_opens_the_tag() -> None:
    assert parse("hm\n</think>\n56", prompt_end="assistant\n<think>\n") == ("hm", "56")
    assert parse("hm", prompt_end="assistant\n<think>\n") == ("hm", "")


def test_text_is_given_as_soon_as_it_is_certain() -> None:
    parser = ThinkParser()
    assert parser.feed("<think>\n") == ("", "")
    assert parser.feed("I see") == ("I see", "")
    assert parser.feed(" \n</thi") == ("", "")
    assert parser.feed("s") == (" \n</this", "")
    assert parser.feed("</think>\n5") == ("", "5")
    assert parser.feed("6 ") == ("", "6 ")


PARTS = st.sampled_from(["<think>", "</think>", " ", "\n", "text", "<", "think>", "</"])


@given(st.lists(PARTS, max_size=8).map("".join), st.booleans())
def test_pieces_and_whole_agree(text: str, opened: bool) -> None:
    prompt_end = "<think>" if opened else ""
    assert parse(*text, prompt_end=prompt_end) == parse(text, prompt_end=prompt_end)


def test_names() -> None:
    assert choose("hermes", "none", "").thinking is None
    assert choose("hermes", "think", "").thinking is ThinkParser
    with pytest.raises(ConfigError, match="think"):
        choose("hermes", "nobody's", "")


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_its_own_channel_and_part_of_the_history(proxied: Any, stream: bool) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says("<think>\nhm\n</think>\n\n56<|im_end|>", "ok<|im_end|>")
        rollout = await proxy.open()
        said: dict[str, str] = {"role": "assistant", "content": "", "reasoning_content": ""}
        async with rollout.client() as client:
            create = client.chat.completions.create
            answer = await create(model="m", messages=[user("7*8?")], stream=stream)
            if stream:
                async for chunk in answer:
                    delta = chunk.choices[0].delta
                    said["content"] += delta.content or ""
                    said["reasoning_content"] += getattr(delta, "reasoning_content", "")
            else:
                said = answer.choices[0].message.model_dump()
            assert (said["content"], said["reasoning_content"]) == ("56", "hm")
            await create(model="m", messages=[user("7*8?"), said, user("Sure?")])
            dropped = {"role": "assistant", "content": "56"}
            await create(model="m", messages=[user("7*8?"), dropped, user("Sure?")])
            await create(model="m", messages=[user("7*8?"), dropped, user("Sure?")])
        one, two, three, four = rollout.turns()
        assert (two.parent_turn_id, two.fork) == (one.turn_id, Fork.NONE)
        assert (three.parent_turn_id, three.fork) == (None, Fork.REASONING_DROPPED)
        assert four.fork is Fork.RESAMPLE
        decode = proxy.engine.vocabulary.decode
        assert "hm" in decode(proxy.engine.requests[1].prompt_token_ids)
        assert "hm" not in decode(proxy.engine.requests[2].prompt_token_ids)

    proxied(work, reasoning_parser="think")


ALWAYS_THINKS = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}{{- '<think>\\nhm\\n</think>\\n\\n' }}{% endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""


@pytest.mark.parametrize("thought", ["hm", "hmm"])
def test_nothing_was_dropped_that_the_template_writes_anyway(
    proxied: Any, tmp_path: Path, thought: str
) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says(f"<think>\n{thought}\n</think>\n\n56<|im_end|>", "ok<|im_end|>")
        rollout = await proxy.open()
        async with rollout.client() as client:
            create = client.chat.completions.create
            await create(model="m", messages=[user("7*8?")])
            said = {"role": "assistant", "content": "56"}
            await create(model="m", messages=[user("7*8?"), said, user("Sure?")])
        one, two = rollout.turns()
        if thought == "hm":
            assert (two.parent_turn_id, two.fork) == (one.turn_id, Fork.NONE)
        else:
            assert (two.parent_turn_id, two.fork) == (None, Fork.REASONING_DROPPED)
        await rollout.end()
        prompt = proxy.engine.requests[1].prompt_token_ids.tolist()
        sequence = rollout.trajectory().sequence(two.turn_id).tolist()
        assert sequence == prompt + proxy.engine.sampled[1]

    template = tmp_path / "always.jinja"
    template.write_text(ALWAYS_THINKS)
    proxied(work, reasoning_parser="think", chat_template=str(template))


def test_reasoning_inside_the_text_is_no_reasoning_dropped(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        text = "<think>\nhm\n</think>\n\n56"
        proxy.engine.says(f"{text}<|im_end|>", "ok<|im_end|>")
        rollout = await proxy.open()
        async with rollout.client() as client:
            create = client.chat.completions.create
            answer = await create(model="m", messages=[user("7*8?")])
            assert answer.choices[0].message.content == text
            said = {"role": "assistant", "content": text}
            await create(model="m", messages=[user("7*8?"), said, user("Sure?")])
        assert [turn.fork for turn in rollout.turns()] == [Fork.ROOT, Fork.NONE]

    proxied(work)


CALL = '<tool_call>\n{"name": "calc", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize("stream", [False, True])
def test_one_call_at_a_time_is_kept_to(proxied: Any, stream: bool) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says(f"a\n{CALL}\n{CALL}<|im_end|>", f"{CALL}<|im_end|>", "ok<|im_end|>")
        tools: Any = [{"type": "function", "function": {"name": "calc"}}]
        rollout = await proxy.open()
        async with rollout.client() as client:

            async def ask(messages: Any) -> Any:
                asked = {"tools": tools, "parallel_tool_calls": False, "messages": messages}
                completions = client.chat.completions
                if not stream:
                    return (await completions.create(model="m", **asked)).choices[0]
                async with completions.stream(model="m", **asked) as events:
                    return (await events.get_final_completion()).choices[0]

            messages: list[Any] = [user("7*8?")]
            for content in ("a", None):
                choice = await ask(messages)
                assert (choice.message.content or None) == content
                assert choice.finish_reason == "tool_calls"
                [call] = choice.message.tool_calls
                result = {"role": "tool", "tool_call_id": call.id, "content": "56"}
                messages += [choice.message.model_dump(exclude={"parsed"}), result]
            await ask(messages)
        one, two, three = rollout.turns()
        decode = proxy.engine.vocabulary.decode
        assert decode(one.token_ids) == f"a\n{CALL}\n<tool_call>"
        assert decode(two.token_ids) == f"{CALL}<|im_end|>"
        assert [two.fork, three.fork] == [Fork.NONE, Fork.NONE]

    proxied(work)


@pytest.mark.parametrize(("opens", "first"), [("", "answer | "), ("<think>\\n", "thought ")])
def test_a_forced_answer_may_be_thought_about(
    proxied: Any, model_folder: Any, tmp_path: Any, opens: str, first: str
) -> None:
    text = (model_folder / "chat_template.jinja").read_text()
    template = tmp_path / "opens.jinja"
    template.write_text(
        text.replace("assistant\\n' }}\n{%- endif", f"assistant\\n{opens}' }}}}\n{{%- endif")
    )

    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        proxy.engine.says('</think>\n{"a": 1}<|im_end|>')
        async with rollout.client() as client:
            await client.chat.completions.create(
                model="m", messages=[user("?")], response_format={"type": "json_object"}
            )
        grammar = proxy.engine.requests[0].grammar
        assert f"\nstart: {first}" in grammar
        assert rollout.turns()[0].constrained

    proxied(work, reasoning_parser="think", chat_template=str(template))
