"""A stand-in for a long conversation is only used where it says the same, in every family."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from model_families import TOOLS, Family

from areal_sub.proxy.neutral import Message, ToolCall
from areal_sub.proxy.recent import Recent
from areal_sub.proxy.render import Renderer
from areal_sub.proxy.template import ChatTemplate, RenderError

CALLS = (
    ToolCall("Abc123xyZ", "calc", '{"a": 7}'),
    ToolCall("Abc123xyQ", "f", '{"x": ["</think>"]}'),
)
SAID = [
    Message("assistant", "Well…"),
    Message("assistant", "", CALLS[:1]),
    Message("assistant", "", CALLS[:1], reasoning="hm"),
    Message("assistant", "So: ", CALLS),
    Message("assistant", "Yes.", reasoning="hm"),
    Message("assistant", "<think>\nhm\n</think>\n\nYes."),
]
USERS = ["Go on.", "<tool_response>\n56\n</tool_response>", "user </think> 1", ""]


def conversation(seed: int, num_turns: int) -> list[Message]:
    """Mostly the same again and again, as agents do, in two phases."""
    random_ = random.Random(seed)
    first = random_.choice(SAID)
    phases = [first, first if seed % 3 else random_.choice(SAID)]
    odd = random_.choice([0.0, 0.0, 0.1, 0.3])
    messages = [Message("system", "Be brief.")] * random_.randrange(2)
    messages.append(Message("user", "What is 7 * 8?"))
    for number in range(num_turns):
        is_odd = random_.random() < odd
        answer = random_.choice(SAID) if is_odd else phases[2 * number // num_turns]
        messages.append(replace(answer, content=answer.content and f"{answer.content} {number}"))
        messages += [Message("tool", f"{number}", tool_call_id=c.id) for c in answer.tool_calls]
        if not answer.tool_calls or random_.random() < 0.1:
            text = random_.choice(USERS) if is_odd else f"Really {number}?"
            messages.append(Message("user", text))
    return messages


def continued(render: Callable[[], list[int] | None]) -> object:
    try:
        return render()
    except RenderError as error:
        return str(error)


def looked_at(renderer: Renderer, seeds: Sequence[int], *, tools: bool) -> Counter[bool | None]:
    """Compares every continuation with that of the whole; how often which way was taken."""
    taken: Counter[bool | None] = Counter()
    shown = TOOLS if tools else ()
    for seed in seeds:
        messages = conversation(seed, 20)
        sorts = [renderer.recent.sort(message) for message in messages]
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        for answer, later in zip(answers, [*answers[1:], len(messages)], strict=True):
            if later == answer + 1:
                continue
            given = messages[:later]
            stand_in = renderer.recent.stand_in(given, sorts[:later], answer + 1, tools)
            kind = stand_in and stand_in.kind
            taken[renderer.recent.is_shown(kind) if kind else None] += 1

            def render(sorts: list[int | None] | None, given: list[Message] = given) -> object:
                num_history = answer + 1  # noqa: B023
                return continued(lambda: renderer.continuation(given, shown, num_history, 1, sorts))

            assert render(sorts[:later]) == render(None), (seed, answer)
    return taken


@pytest.mark.parametrize("tools", [False, True])
def test_it_says_the_same_as_the_whole(family: Family, renderer: Renderer, tools: bool) -> None:
    renderer.recent = Recent(renderer.template.literals)
    taken = looked_at(renderer, range(9), tools=tools)
    # And it is used: else this proves nothing, and long rollouts are slow.
    assert taken[True] >= 10, taken


def test_what_is_dropped_from_the_middle_is_noticed_each_time(
    family: Family, renderer: Renderer
) -> None:
    """Only the first answers were thought about, and the new user's message drops that."""
    traits = family.traits
    if not traits.keeps_reasoning or traits.keeps_old_reasoning:
        pytest.skip("the template treats all thoughts alike")
    renderer.recent = Recent(renderer.template.literals)
    call = Message("assistant", "", CALLS[:1])
    result = Message("tool", "56", tool_call_id=CALLS[0].id)
    thought = replace(call, reasoning="hm")
    messages = [Message("user", "7 * 8?"), *[thought, result] * 4, *[call, result] * 4]
    messages += [Message("assistant", "56."), Message("user", "Sure?")]
    sorts = [renderer.recent.sort(message) for message in messages]
    for _ in range(3):
        assert renderer.continuation(messages, TOOLS, len(messages) - 1, 1, sorts) is None


def test_it_is_short_whatever_came_before(renderer: Renderer) -> None:
    for num_turns in (10, 20, 40):
        call = Message("assistant", "", CALLS[:1])
        exchange = [call, Message("tool", "56", tool_call_id=CALLS[0].id)]
        asked = [Message("system", "Be brief."), Message("user", "7 * 8?")]
        messages = [*asked, *exchange * num_turns]
        answer = len(messages) - 2
        sorts = [renderer.recent.sort(message) for message in messages]
        stand_in = renderer.recent.stand_in(messages, sorts, answer + 1, False)
        assert stand_in is not None
        assert [messages[index] for index in stand_in.indices] == [*asked, *exchange * 2]


def test_nobody_can_use_up_the_sorts_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("areal_sub.proxy.recent.MAX_SORTS", 4)
    recent = Recent(("<a>", "<b>", "<c>"))
    mine = Message("user", "mine", name="me")
    numbers = [recent.sort(mine)]
    for text in ("<a>", "<b>", "<c>", "<a><b>", "<b><c>", "<a><c>", "<a><b><c>"):
        number = recent.sort(Message("user", f"? {text}"))
        assert number == recent.sort(Message("user", f"! {text}"))
        numbers.append(number)
    numbers.append(recent.sort(mine))  # anew
    assert len(set(numbers)) == len(numbers), "none means two things"
    assert recent.sort(mine) == numbers[-1]


def test_what_is_remembered_of_a_conversation_is_bounded() -> None:
    recent = Recent(())
    messages = [Message("user", "?"), *[Message("assistant", "!"), Message("user", "?")] * 200]
    alike, all_different = [0] * 401, [*range(401)]
    assert recent.stand_in(messages, alike, 400, False) is not None
    assert recent.stand_in(messages, all_different, 400, False) is None


def test_a_kind_that_differed_once_is_rendered_whole() -> None:
    recent = Recent(())
    recent.note(("kind",), False)
    recent.note(("kind",), True)
    assert recent.is_shown(("kind",)) is False


def test_a_template_names_the_texts_that_it_looks_for() -> None:
    source = "{% if '<a>' in x or x == 'word' %}{{ x.split('</b>\\n')[0] + '' }}{% endif %}"
    assert ChatTemplate({"default": source}, {}).literals == ("</b>", "<a>")
    assert ChatTemplate({"default": "{{ x }}"}, {}).literals == ()
