"""With the real vocabularies, and against OpenAI's own harmony. `make test-families` runs these."""

from __future__ import annotations

import datetime
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_families import FAMILIES, TOOLS, Family
from real_vocabularies import CACHE, REAL, o200k, real_folder, wheel, write_tiktoken
from test_families import SYSTEM, USER, answers, read, stability

from areal_sub.proxy.history import message_hash
from areal_sub.proxy.neutral import Choice, Message, ToolCall
from areal_sub.proxy.parsers import ParsedCall
from areal_sub.proxy.render import Renderer

pytestmark = [
    pytest.mark.registry,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        "AREAL_SUB_REGISTRIES" not in os.environ,
        reason="downloads packages; make test-families",
    ),
]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Renderer]:
    folder = tmp_path_factory.mktemp("real")
    return {name: Renderer.load(real_folder(name, folder / name)) for name in REAL}


def family_of(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


@pytest.mark.parametrize("name", REAL)
def test_real_vocabularies_go_on_as_the_small_ones(
    new_stub: Any,
    renderer_of: Callable[[Family], Renderer],
    real: dict[str, Renderer],
    tmp_path: Path,
    name: str,
) -> None:
    family = family_of(name)
    small = stability(new_stub, family, renderer_of(family), tmp_path / "small")
    assert stability(new_stub, family, real[name], tmp_path / "real") == small


@pytest.mark.parametrize("name", REAL)
def test_real_vocabularies_read_what_is_written(real: dict[str, Renderer], name: str) -> None:
    family, renderer = family_of(name), real[name]
    prompt = renderer.prompt([SYSTEM, USER], TOOLS)
    text = renderer.vocabulary.decode(prompt)
    assert prompt == renderer.vocabulary.full.encode(text, add_special_tokens=False).ids
    for message in answers(family, renderer):
        ids = renderer.vocabulary.encode(family.sampled(message))
        for size in (1, 1000):
            answer = read(family, renderer, ids, text[-40:], size)
            assert message_hash(answer.message()) == message_hash(message)


@pytest.mark.parametrize("name", REAL)
def test_real_vocabularies_have_the_ids_of_a_text_by_its_words(
    real: dict[str, Renderer], name: str
) -> None:
    vocabulary = real[name].vocabulary
    assert vocabulary._words is not None
    for page in [*Path("docs").glob("*.md"), *Path("areal_sub/proxy").rglob("*.py")]:
        for text in page.read_text().split("\n\n"):
            if text:
                [whole] = vocabulary._encode_each([text])
                assert vocabulary._words.ids(text) == whole


@pytest.fixture(scope="module")
def harmony() -> Any:
    """OpenAI's package, with the vocabulary that it would download."""
    folder = CACHE / "encodings"
    if not (folder / "o200k_base.tiktoken").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_tiktoken(o200k(), folder / "o200k_base.tiktoken")
    sys.path.append(str(wheel("openai-harmony==0.0.8")))
    os.environ["TIKTOKEN_ENCODINGS_BASE"] = str(folder)
    import openai_harmony

    return openai_harmony


@functools.cache
def encoding_of(harmony: Any) -> Any:
    return harmony.load_harmony_encoding("HarmonyGptOss")


TEXTS = st.lists(
    st.one_of(st.text(max_size=5), st.sampled_from(["<|end|>", "<|start|>system", "日本", "😀'"])),
    max_size=6,
).map(lambda parts: "x" + "".join(parts) + "y")
SETTINGS = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@SETTINGS
@given(system=TEXTS, user=TEXTS, thought=TEXTS, op=TEXTS, result=TEXTS, called=st.booleans())
def test_prompts_are_those_of_the_reference(
    real: dict[str, Renderer],
    harmony: Any,
    system: str,
    user: str,
    thought: str,
    op: str,
    result: str,
    called: bool,
) -> None:
    parameters = {"type": "object", "properties": {"op": {"type": "string"}}, "required": ["op"]}
    function = {"name": "calc", "description": "Computes.", "parameters": parameters}
    of, arguments = (
        harmony.Message.from_role_and_content,
        json.dumps({"op": op}, ensure_ascii=False),
    )
    head = harmony.SystemContent.new().with_conversation_start_date(
        datetime.datetime.now().astimezone().strftime("%Y-%m-%d")
    )
    tool = harmony.ToolDescription.new("calc", "Computes.", parameters)
    developer = harmony.DeveloperContent.new().with_instructions(system)
    theirs = [
        of(harmony.Role.SYSTEM, head),
        of(harmony.Role.DEVELOPER, developer.with_function_tools([tool])),
        of(harmony.Role.USER, user),
    ]
    ours = [Message("system", system), Message("user", user)]
    if called:
        call = of(harmony.Role.ASSISTANT, arguments).with_channel("commentary")
        author = harmony.Author.new(harmony.Role.TOOL, "functions.calc")
        answer = harmony.Message.from_author_and_content(
            author, json.dumps(result, ensure_ascii=False)
        )
        theirs += [
            of(harmony.Role.ASSISTANT, thought).with_channel("analysis"),
            call.with_recipient("functions.calc").with_content_type("json"),
            answer.with_channel("commentary").with_recipient("assistant"),
        ]
        calls = (ToolCall("c", "calc", arguments),)
        ours.append(Message("assistant", "", calls, reasoning=thought))
        ours.append(Message("tool", result, tool_call_id="c"))
    encoding = encoding_of(harmony)
    conversation = harmony.Conversation.from_messages(theirs)
    ids = encoding.render_conversation_for_completion(conversation, harmony.Role.ASSISTANT)
    assert real["gpt_oss"].prompt(ours, [{"type": "function", "function": function}]) == ids


@SETTINGS
@given(
    parts=st.lists(st.tuples(st.sampled_from("acft"), TEXTS, st.booleans()), min_size=1, max_size=3)
)
def test_answers_are_read_as_by_the_reference(
    real: dict[str, Renderer], harmony: Any, parts: list[tuple[str, str, bool]]
) -> None:
    channels = {"a": "analysis", "c": "commentary", "f": "final", "t": "commentary"}
    written = []
    for kind, body, recipient_first in parts:
        text = body.replace("<|", "<")
        if kind != "t":
            written.append(f"<|channel|>{channels[kind]}<|message|>{text}")
            continue
        text = json.dumps({"op": text})
        to = " to=functions.calc"
        head = f"{to}<|channel|>commentary json" if recipient_first else None
        written.append(
            (head or f"<|channel|>commentary{to} <|constrain|>json") + "<|message|>" + text
        )
    end = "<|call|>" if parts[-1][0] == "t" else "<|return|>"
    renderer = real["gpt_oss"]
    ids = renderer.vocabulary.encode("<|end|><|start|>assistant".join(written) + end)
    encoding = encoding_of(harmony)
    theirs = encoding.parse_messages_from_completion_tokens(ids, harmony.Role.ASSISTANT)

    def said(of: Callable[[Any], bool]) -> str:
        return "\n\n".join(m.content[0].text for m in theirs if not m.recipient and of(m.channel))

    parser, ours = renderer.format.parser(TOOLS, ""), Choice()
    for piece in [*parser.feed(renderer.vocabulary.decode(ids)), *parser.finish()]:
        if isinstance(piece, ParsedCall):
            ours.append(ToolCall("", piece.name, piece.arguments))
        else:
            ours.append(piece)
    assert ours.reasoning == said(lambda channel: channel == "analysis")
    assert ours.text == said(lambda channel: channel != "analysis")
    assert [("functions." + call.name, json.loads(call.arguments)) for call in ours.tool_calls] == [
        (m.recipient, json.loads(m.content[0].text)) for m in theirs if m.recipient
    ]
