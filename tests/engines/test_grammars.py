"""Sampling under a grammar: with the engines' real processes, a random model and a real tokenizer.

With vLLM: `make test-vllm`.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import psutil
import pytest
import torch
import transformers
from engine_lab import (
    VOCAB,
    EngineProcess,
    LocalDecoder,
    engine_process,
    make_model,
    prompt_of,
    request_of,
)
from grammar_lab import SPECIAL, make_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from vllm_lab import START_S, vllm_server

from areal_sub.engine_client import EngineClient
from areal_sub.engines.embedded import grammars
from areal_sub.engines.embedded.grammars import Constraint, Grammars, fault, receive_all
from areal_sub.engines.embedded.matching import FRAME, MASK, TOKEN
from areal_sub.errors import GrammarError, RpcError
from areal_sub.records import GenerateChunk, GenerateRequest

# Beyond them the library takes enum and const for the nearest double: the proxy refuses those.
EXACT_INTEGERS = st.integers(-(2**53), 2**53)
# Two characters at most between any two: what a random model writes stays short.
COMPACT = {"x-guidance": {"whitespace_pattern": " "}}


@dataclass
class Lab:
    engine: EngineProcess
    tokenizer: Tokenizer
    folder: Path
    hottest: float  # temperature that the engine takes

    @property
    def is_vllm(self) -> bool:
        return self.hottest == VLLM_HOTTEST

    @property
    def stop(self) -> int:
        token_id: int = self.tokenizer.token_to_id("<|im_end|>")
        return token_id

    def request(self, grammar: str, **fields: Any) -> GenerateRequest:
        prompt = self.tokenizer.encode("text").ids
        given = {"max_new_tokens": 300, "temperature": 1.0, "stop_token_ids": [self.stop]}
        return request_of(prompt, grammar=grammar, **{**given, **fields})

    def json(self, schema: Any, **fields: Any) -> GenerateRequest:
        return self.request("start: %json " + json.dumps({**COMPACT, **schema}), **fields)

    def sample(self, *requests: GenerateRequest) -> list[GenerateChunk]:
        async def work(client: EngineClient) -> list[GenerateChunk]:
            return await asyncio.gather(*(whole(client, r) for r in requests))

        return self.engine.run(work)

    def text(self, chunk: GenerateChunk) -> str:
        ids = chunk.token_ids.tolist()
        assert (ids[-1] == self.stop) == (chunk.finish_reason == "stop")
        return str(self.tokenizer.decode([i for i in ids if i != self.stop]))


async def whole(client: EngineClient, request: GenerateRequest) -> GenerateChunk:
    (chunk,) = [chunk async for chunk in client.generate(request)]
    return chunk


VLLM_HOTTEST = 2.0
VLLM = pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.timeout(1000)])


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece", VLLM])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("grammars")
    if request.param == "vllm":
        tokenizer = make_folder(folder)
        with vllm_server(folder) as engine:
            yield Lab(engine, tokenizer, folder, VLLM_HOTTEST)
    else:
        tokenizer = make_folder(folder, request.param)
        with engine_process(folder, model_path=str(folder), max_running_requests=8) as engine:
            yield Lab(engine, tokenizer, folder, hottest=50.0)


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    bounds = st.tuples(st.integers(-999, 999), st.integers(0, 500))
    names = st.sampled_from(["a", "b", "Ü", 'q"uote', "long name", "漢"])
    scalars = st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        bounds.map(lambda b: {"type": "integer", "minimum": b[0], "maximum": b[0] + b[1]}),
        st.integers(0, 6).map(lambda n: {"type": "string", "maxLength": n}),
        st.sampled_from([{"type": "string", "pattern": "^[a-c]{2,4}$"}, {"const": {"k": [1]}}]),
        st.lists(
            st.one_of(names, EXACT_INTEGERS, st.none()), min_size=1, max_size=4, unique=True
        ).map(lambda values: {"enum": values}),
    )

    def extend(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        objects = st.dictionaries(names, inner, max_size=3).flatmap(
            lambda properties: st.sets(st.sampled_from(sorted(properties) or ["a"])).map(
                lambda required: {
                    "type": "object",
                    "properties": properties,
                    "required": sorted(required & set(properties)),
                    "additionalProperties": False,
                }
            )
        )
        arrays = st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
            lambda a: {"type": "array", "items": a[0], "minItems": a[1], "maxItems": a[1] + a[2]}
        )
        return st.one_of(objects, arrays, st.lists(inner, min_size=1, max_size=3).map(_any_of))

    return st.recursive(scalars, extend, max_leaves=6)


def _any_of(options: list[dict[str, Any]]) -> dict[str, Any]:
    return {"anyOf": options}


@given(st.lists(schemas(), min_size=1, max_size=6), st.sampled_from([0.0, 1.0, 2.0]))
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_what_a_random_model_writes_validates(
    lab: Lab, wanted: list[dict[str, Any]], temperature: float
) -> None:
    requests = [lab.json(schema, temperature=temperature, top_p=0.9) for schema in wanted]
    for schema, chunk in zip(wanted, lab.sample(*requests), strict=True):
        text = lab.text(chunk)
        if chunk.finish_reason == "stop":
            jsonschema.validate(json.loads(text), schema)
        else:
            assert (chunk.finish_reason, len(chunk.token_ids)) == ("length", 300)


def test_logprobs_are_the_models_own(lab: Lab) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    temperatures = {0.0: 1.0, 0.7: 0.7, 2.0: 2.0}
    chunks = lab.sample(*(lab.json(schema, temperature=t, top_p=0.5) for t in temperatures))
    model = transformers.AutoModelForCausalLM.from_pretrained(lab.folder).eval()
    prompt = lab.request("").prompt_token_ids.tolist()
    for scale, chunk in zip(temperatures.values(), chunks, strict=True):
        ids = chunk.token_ids.tolist()
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        own = torch.log_softmax(logits / scale, -1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        np.testing.assert_allclose(chunk.logprobs, own.numpy(), atol=1e-3)
        assert chunk.logprobs.min() < -1  # a random model would not have said this


def test_only_tokens_of_text_match_text(lab: Lab) -> None:
    """Not the control tokens, nor the ids that the model has and the tokenizer has not."""
    requests = [lab.request(r"start: /(.|\n)*/", temperature=lab.hottest, max_new_tokens=500)] * 4
    control = {lab.tokenizer.token_to_id(t) for t in (*SPECIAL, "<tool_call>", "</tool_call>")}
    for chunk in lab.sample(*requests):
        ids = chunk.token_ids.tolist()
        text_ids = [i for i in ids if i != lab.stop]
        assert control.isdisjoint(text_ids)
        assert max(text_ids) < lab.tokenizer.get_vocab_size()


def test_text_that_looks_like_a_control_token_is_text(lab: Lab) -> None:
    const = "<|im_end|></tool_call>"
    (chunk,) = lab.sample(lab.json({"const": const}))
    assert json.loads(lab.text(chunk)) == const
    assert lab.tokenizer.token_to_id("</tool_call>") not in chunk.token_ids


def test_a_control_token_is_its_id(lab: Lab) -> None:
    begin, end = (lab.tokenizer.token_to_id(t) for t in ("<tool_call>", "</tool_call>"))
    (chunk,) = lab.sample(lab.request(f'start: <[{begin}]> "a" <[{end}]>'))
    first, *text, last, stop = chunk.token_ids.tolist()
    assert (first, lab.tokenizer.decode(text), last, stop) == (begin, "a", end, lab.stop)


def test_the_end_allows_exactly_the_stop_tokens(lab: Lab) -> None:
    other = lab.tokenizer.token_to_id("<|endoftext|>")
    both = lab.sample(lab.request('start: "a"'), lab.request('start: "a"', stop_token_ids=[other]))
    assert [chunk.token_ids.tolist()[-1] for chunk in both] == [lab.stop, other]
    assert [len(chunk.token_ids) for chunk in both] == [2, 2]


def test_an_object_may_have_very_many_properties(lab: Lab) -> None:
    properties = {f"p{i}": {"const": 1} for i in range(1000)}
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    (chunk,) = lab.sample(lab.json(schema, max_new_tokens=20))
    assert chunk.finish_reason in ("stop", "length")


def test_length_cuts(lab: Lab) -> None:
    (chunk,) = lab.sample(lab.json({"type": "string", "minLength": 50}, max_new_tokens=7))
    assert (chunk.finish_reason, len(chunk.token_ids)) == ("length", 7)


def test_the_unconstrained_of_a_batch_do_not_notice(lab: Lab) -> None:
    free = [lab.request("", temperature=0.0, max_new_tokens=60 + i) for i in range(3)]
    alone = [chunk.token_ids.tolist() for chunk in lab.sample(*free)]
    held = [lab.json({"type": "array", "items": {"type": "integer"}}) for _ in range(4)]
    mixed = lab.sample(held[0], free[0], held[1], free[1], *held[2:], free[2])
    assert [mixed[i].token_ids.tolist() for i in (1, 3, 6)] == alone


def matchers(lab: Lab) -> list[psutil.Process]:
    """The processes that match, templates not among them."""
    templates = set()
    forks = []
    for process in psutil.Process(lab.engine.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.ppid() in templates:  # parents come first
                forks.append(process)
            elif any("matching" in part for part in process.cmdline()):
                templates.add(process.pid)
    return forks


ENDLESS = {"type": "string", "minLength": 10**6}


async def until_none(lab: Lab, client: EngineClient) -> None:
    while matchers(lab):
        await client.info()


async def until_matched(lab: Lab, asked: asyncio.Task[Any]) -> list[psutil.Process]:
    """The matchers of all that is asked for, as soon as they are there."""
    while len(found := matchers(lab)) < (2 if lab.is_vllm else 1):  # vLLM has one of its own
        assert not asked.done(), asked.result()
        await asyncio.sleep(0)
    return found


def test_an_ended_request_leaves_no_process(lab: Lab) -> None:
    async def work(client: EngineClient) -> None:
        assert (await whole(client, lab.json({"const": 1}))).finish_reason == "stop"
        await until_none(lab, client)

    lab.engine.run(work)


def test_an_aborted_request_leaves_no_process(lab: Lab) -> None:
    async def work(client: EngineClient) -> None:
        request = lab.json(ENDLESS, max_new_tokens=1900, stream=True)
        async with aclosing(client.generate(request)) as given:
            await anext(given)
        await until_none(lab, client)

    lab.engine.run(work)


def test_a_request_aborted_while_paused_leaves_no_process(lab: Lab) -> None:
    """The engine takes no step that it could be done at."""

    async def work(client: EngineClient) -> None:
        await until_none(lab, client)
        await client.pause()
        asked = asyncio.ensure_future(whole(client, lab.json(ENDLESS, max_new_tokens=1900)))
        await until_matched(lab, asked)
        asked.cancel()
        await until_none(lab, client)
        await client.resume()

    lab.engine.run(work)


TOO_MUCH = "more CPU time, memory or stack"


def test_a_killed_matcher_ends_its_request_alone(lab: Lab) -> None:
    async def work(client: EngineClient) -> None:
        await until_none(lab, client)
        beside = asyncio.ensure_future(whole(client, lab.request("", max_new_tokens=1900)))
        await client.pause()  # so that it cannot be done before the matchers are found
        schema = {**ENDLESS, "title": "killed"}  # one that does not compile is not tried again
        asked = asyncio.ensure_future(whole(client, lab.json(schema, max_new_tokens=1900)))
        for process in await until_matched(lab, asked):
            process.kill()
        await client.resume()
        with pytest.raises((GrammarError, RpcError), match=TOO_MUCH):
            await asked
        assert (await beside).finish_reason in ("length", "stop")
        await until_none(lab, client)

    lab.engine.run(work)


@pytest.mark.parametrize("last_by", ["length", "stop", "neither"])
def test_what_no_mask_allowed_is_no_answer(lab: Lab, last_by: str) -> None:
    """Also where the request would have been at its end with it."""
    # The library gives up after the "a": there is no mask for the fifth token.
    big = "|".join(f"(a|b)*a(a|b){{{k}}}c" for k in range(5, 2405, 2))
    grammar = f'start: "qqq" BIG\nBIG: /a.*/ & /{big}/'
    tokens = range(lab.tokenizer.get_vocab_size())
    others = [i for i in tokens if lab.tokenizer.decode([i]) not in ("q", "a")]
    stops = others if last_by == "stop" else [lab.stop]

    def request(max_new_tokens: int) -> GenerateRequest:
        return lab.request(grammar, max_new_tokens=max_new_tokens, stop_token_ids=stops)

    (chunk,) = lab.sample(request(4))
    assert (chunk.finish_reason, len(chunk.token_ids)) == ("length", 4)
    with pytest.raises(RpcError, match=TOO_MUCH if lab.is_vllm else "too many expressions"):
        lab.sample(request(5 if last_by == "length" else 300))


@pytest.mark.parametrize("part", ["vllm.entrypoints", "EngineCore"])
@pytest.mark.parametrize("lab", [VLLM], indirect=True)
def test_an_answer_goes_on_after_its_server_was_killed(lab: Lab, part: str) -> None:
    schema = {"type": "array", "items": {"const": "value"}, "minItems": 150, "maxItems": 150}

    async def work(client: EngineClient) -> list[GenerateChunk]:
        chunks = []
        request = lab.json(schema, max_new_tokens=1900, stream=True)
        async with aclosing(client.generate(request)) as given:
            async for chunk in given:
                chunks.append(chunk)
                if len(chunks) == 1:
                    engine = psutil.Process(lab.engine.process.pid)
                    for process in engine.children(recursive=True):
                        with suppress(psutil.NoSuchProcess):
                            if part in " ".join(process.cmdline()):
                                process.kill()
        return chunks

    chunks = lab.engine.run(work, START_S)
    assert len(chunks) > 1 and chunks[-1].finish_reason == "stop"
    ids = [i for chunk in chunks for i in chunk.token_ids.tolist()]
    assert json.loads(lab.tokenizer.decode(ids[:-1])) == ["value"] * 150


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"not": {"type": "string"}}, 'Unimplemented keys: ["not"]'),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        (
            {"type": "integer", "minimum": 3, "maximum": 2},
            "minimum (3) is greater than maximum (2)",
        ),
        ({"$ref": "#/$defs/none"}, "Pointer '/$defs/none' does not exist"),
        ({"$ref": "http://127.0.0.1:1/x"}, "is not present in a registry"),
        ({"$ref": "file:///etc/passwd"}, "is not present in a registry"),
        ({"type": "string", "pattern": "(" * 10**5 + "a" + ")" * 10**5}, "regex parse error"),
        ({"type": "object", "properties": {f"p{i}": {} for i in range(10**5)}}, "too large"),
    ],
)
def test_what_is_wrong_with_a_schema_is_said(lab: Lab, schema: Any, says: str) -> None:
    with pytest.raises(GrammarError) as caught:
        lab.sample(lab.json(schema))
    assert says in str(caught.value)
    assert len(str(caught.value)) < 500


def chain(length: int, link: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    definitions = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(length)}
    return {"$defs": {**definitions, f"d{length}": {"type": "null"}}, "$ref": "#/$defs/d0"}


HOSTILE = {
    "overflows the stack": chain(20_000, lambda ref: {"allOf": [ref]}),
    "overflows the stack by arrays": chain(20_000, lambda ref: {"type": "array", "items": ref}),
    "compiles for minutes": {
        "allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{k}}}c"} for k in range(5, 25)]
    },
    "compiles for seconds": {
        "type": "object",
        "patternProperties": {f"^a{{{i}}}(b|c)*x{i}$": {"type": "null"} for i in range(600)},
    },
}


@pytest.mark.parametrize("schema", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_schema_costs_its_own_request_only(lab: Lab, schema: Any) -> None:
    (alone,) = lab.sample(lab.request("", temperature=0.0))

    async def work(client: EngineClient) -> GenerateChunk:
        bad = [asyncio.ensure_future(whole(client, lab.json(schema))) for _ in range(4)]
        beside = await whole(client, lab.request("", temperature=0.0))
        for ended in await asyncio.gather(*bad, return_exceptions=True):
            assert isinstance(ended, GrammarError)
            assert "more CPU time, memory or stack" in str(ended)
        return beside

    assert lab.engine.run(work).token_ids.tolist() == alone.token_ids.tolist()
    (good,) = lab.sample(lab.json({"type": "null"}))
    assert lab.text(good) == "null"


def test_a_model_without_a_usable_tokenizer_says_so(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with (
        engine_process(tmp_path, model_path=str(tmp_path)) as engine,
        pytest.raises(GrammarError, match=r"cannot be constrained.*tokenizer\.json"),
    ):
        engine.run(lambda client: whole(client, request_of([1], grammar='start: "a"')))


def test_masks_that_cost_more_than_a_bit_each_come_to_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "CPU_S", 0.05)
    tokenizer = make_folder(tmp_path)
    letter = tokenizer.token_to_id("a")

    async def num_masks(grammar: str, at_most: int) -> int:
        source = Grammars(str(tmp_path), vocab_size=tokenizer.get_vocab_size(), max_open=1)
        constraint = await source.compile(grammar, stop_token_ids=[])
        num = 0
        while num < at_most and not constraint.error:
            constraint.advance(letter)
            receive_all([constraint], timeout_s=10.0)
            num += 1
        constraint.close()
        await asyncio.sleep(0)  # the end of its process is a callback of the loop
        source.close()
        assert constraint.error in ("", grammars.TOO_MUCH)
        return num

    honest, ambiguous = "start: /a*/", 'start: e\ne: "a" | e e'  # this one's take longer and longer
    assert asyncio.run(num_masks(honest, 2000)) == 2000
    assert asyncio.run(num_masks(ambiguous, 500)) < 500


def test_a_grammar_whose_template_was_killed_is_tried_again(tmp_path: Path) -> None:
    tokenizer = make_folder(tmp_path)

    async def work() -> None:
        source = Grammars(str(tmp_path), vocab_size=tokenizer.get_vocab_size(), max_open=1)
        (await source.compile('start: "a"', stop_token_ids=[])).close()
        await asyncio.sleep(0)
        ours = psutil.Process().children()
        (template,) = [p for p in ours if any("matching" in part for part in p.cmdline())]
        template.suspend()
        compiling = asyncio.ensure_future(source.compile('start: "b"', stop_token_ids=[]))
        while source.num_open == 0:  # it has not asked for a fork yet
            await asyncio.wait([compiling], timeout=0)
        template.kill()
        with pytest.raises(GrammarError, match="the process that matches grammars ended"):
            await compiling
        constraint = await source.compile('start: "b"', stop_token_ids=[])
        assert constraint.mask is not None
        constraint.close()
        await asyncio.sleep(0)
        source.close()

    asyncio.run(work())


# The decode thread against an other side that answers when the test wants it to.


class Answering:
    """Allows one given token after another, each only when told to."""

    def __init__(self) -> None:
        here, self.there = socket.socketpair()
        here.setblocking(False)
        self.there.settimeout(10.0)
        self.num_closed = 0
        self.constraint = Constraint(here, VOCAB, self._on_close)

    def _on_close(self) -> None:
        self.constraint.connection.close()
        self.there.close()
        self.num_closed += 1

    def allow(self, *token_ids: int) -> None:
        bits = np.zeros(-(-VOCAB // 32) * 32, dtype=np.uint8)
        bits[list(token_ids)] = 1
        body = np.packbits(bits, bitorder="little").tobytes()
        self.there.sendall(FRAME.pack(MASK, len(body)) + body)

    def sampled(self) -> int:
        (token_id,) = TOKEN.unpack(self.there.recv(TOKEN.size))
        return int(token_id)


def test_who_has_no_mask_yet_holds_up_nobody(decoders: Callable[..., LocalDecoder]) -> None:
    model = make_model("llama")
    decoder = decoders(model)
    slow = Answering()
    slow.allow(5)
    held = decoder.send(request_of(prompt_of(9), max_new_tokens=3), constraint=slow.constraint)
    assert slow.sampled() == 5
    # It now waits for its second mask, while this one runs from its beginning to its end.
    decoder.wait(decoder.send(request_of(prompt_of(20), max_new_tokens=40)))
    slow.allow(8)
    assert slow.sampled() == 8
    decoder.wait(decoder.send(request_of(prompt_of(5), max_new_tokens=10)))
    slow.allow(*range(VOCAB))
    ended = decoder.wait(held)
    # The last one is the model's own choice: what it had seen was computed again and again alike.
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt_of(9), 5, 8]])).logits[0, -1]
    assert list(ended.token_ids) == [5, 8, int(logits.argmax())]
    assert slow.num_closed == 1


def test_a_mask_that_does_not_come_ends_its_request(
    decoders: Callable[..., LocalDecoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "STEP_TIMEOUT_S", 0.05)
    slow = Answering()
    decoder = decoders(make_model("llama"))
    ended = decoder.wait(decoder.send(request_of(prompt_of(9)), constraint=slow.constraint))
    assert "0.05 s for one token" in ended.error
    assert slow.num_closed == 1


def test_a_process_that_dies_ends_its_request(decoders: Callable[..., LocalDecoder]) -> None:
    dying = Answering()
    decoder = decoders(make_model("llama"))
    dying.there.shutdown(socket.SHUT_RDWR)
    ended = decoder.wait(decoder.send(request_of(prompt_of(9)), constraint=dying.constraint))
    assert "CPU time, memory or stack" in ended.error


def test_aborts_close_running_and_waiting_ones(decoders: Callable[..., LocalDecoder]) -> None:
    decoder = decoders(make_model("llama"), max_running_requests=1)
    one, two = Answering(), Answering()
    one.allow(3)
    running = decoder.send(request_of(prompt_of(4)), constraint=one.constraint)
    waiting = decoder.send(request_of(prompt_of(4)), constraint=two.constraint)
    assert one.sampled() == 3
    decoder.abort(waiting)
    decoder.abort(running)
    decoder.wait(decoder.send(request_of(prompt_of(4))))
    assert (one.num_closed, two.num_closed) == (1, 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("at 1(8): failed to compile JSON schema: A b\n   1 | start: …\n      ^\n", "A b"),
        ("NoExtensionBias\n<non-verbose/>", "NoExtensionBias"),
        ("at 3(1): unknown name\n   2 | x\n   3 | y\n", "unknown name"),
        ("x" * 1000, "x" * 400 + "…"),
    ],
)
def test_faults_are_told_without_our_text(text: str, says: str) -> None:
    assert fault(text) == says
