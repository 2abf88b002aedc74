"""Google's Gemini through the real SDK, over real sockets."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from google.genai import errors, types

from areal_sub.proxy.dialects import Asked, gemini
from areal_sub.proxy.refusals import Refusal
from areal_sub.records import Fork

CALL = '<tool_call>\n{"name": "calc", "arguments": {"a": 7, "b": 8}}\n</tool_call>'
DECLARED: Any = {
    "name": "calc",
    "description": "Multiplies.",
    "parameters": {
        "type": "OBJECT",
        "properties": {"a": {"type": "INTEGER", "nullable": True}, "type": {"type": "STRING"}},
    },
}
CONFIG: Any = {
    "tools": [{"function_declarations": [DECLARED]}],
    "automatic_function_calling": {"disable": True},
    "thinking_config": {"include_thoughts": True, "thinking_budget": 128},
    "temperature": 1.0,
    "top_k": 40.0,
}


def test_one_turn(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says("56<|im_end|>")
        rollout = await proxy.open()
        client = rollout.gemini()
        answer = await client.models.generate_content(
            model="gemini-x", contents="7*8?", config={"system_instruction": "Be brief."}
        )
        assert answer.text == "56"
        assert answer.model_version == "gemini-x"
        assert answer.candidates[0].finish_reason == "STOP"
        [request], [sampled] = proxy.engine.requests, proxy.engine.sampled
        usage = answer.usage_metadata
        assert usage.prompt_token_count == len(request.prompt_token_ids)
        assert usage.candidates_token_count == len(sampled)
        [turn] = rollout.turns()
        assert (turn.turn_id, turn.dialect, turn.model) == (
            answer.response_id,
            "gemini",
            "gemini-x",
        )
        assert proxy.engine.vocabulary.decode(request.prompt_token_ids) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n7*8?<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        counted = await client.models.count_tokens(model="m", contents="7*8?")
        await client.models.generate_content(model="m", contents="7*8?")
        assert counted.total_tokens == len(proxy.engine.requests[1].prompt_token_ids)
        await rollout.end(reward=None, turn_rewards={answer.response_id: 0.5})
        assert proxy.records()[-1].turn_rewards == {answer.response_id: 0.5}
        await client.aclose()

    proxied(work)


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_with_tools_is_token_exact(proxied: Any, stream: bool) -> None:
    """The SDK's chat keeps the history, chunk by chunk where it streams."""

    async def work(proxy: Any) -> None:
        thought = "<think>\nhm\n</think>\n\n"
        proxy.engine.says(
            f"{thought}I compute.\n{CALL}\n{CALL}<|im_end|>",
            f"{thought}56, yes.<|im_end|>",
            "ok<|im_end|>",
        )
        rollout = await proxy.open()
        client = rollout.gemini()
        chat = client.chats.create(model="m", config=CONFIG)

        async def send(message: Any) -> list[Any]:
            if not stream:
                chunks = [await chat.send_message(message)]
            else:
                chunks = [chunk async for chunk in await chat.send_message_stream(message)]
            assert chunks[-1].candidates[0].finish_reason == "STOP"
            return [part for chunk in chunks for part in chunk.candidates[0].content.parts]

        parts = await send("7*8?")
        assert "".join(part.text for part in parts if part.thought) == "hm"
        texts = [part.text or "" for part in parts if not part.thought]
        assert "".join(texts) == "I compute."
        calls = [part.function_call for part in parts if part.function_call]
        assert [(call.name, call.args) for call in calls] == [("calc", {"a": 7, "b": 8})] * 2
        results = [
            types.Part.from_function_response(name="calc", response={"result": "56"}),
            types.Part(function_response={"id": calls[1].id, "name": "calc", "response": {"x": 1}}),
        ]
        await send(results)
        await send("Sure?")
        one, two, three = rollout.turns()
        assert [turn.fork for turn in (one, two, three)] == [Fork.ROOT, Fork.NONE, Fork.NONE]
        assert (two.parent_turn_id, three.parent_turn_id) == (one.turn_id, two.turn_id)
        await rollout.end()
        prompt = proxy.engine.requests[2].prompt_token_ids.tolist()
        sequence = rollout.trajectory().sequence(three.turn_id).tolist()
        assert sequence == prompt + proxy.engine.sampled[2]
        decode = proxy.engine.vocabulary.decode
        assert decode(two.context_token_ids) == (
            "\n<|im_start|>user\n<tool_response>\n56\n</tool_response>"
            '\n<tool_response>\n{"x":1}\n</tool_response><|im_end|>\n<|im_start|>assistant\n'
        )
        shown = decode(proxy.engine.requests[0].prompt_token_ids)
        assert '"type": {"type": "string"}' in shown
        assert "INTEGER" not in shown
        await client.aclose()

    proxied(work, reasoning_parser="think")


def test_automatic_function_calling(proxied: Any) -> None:
    def calc(a: int, b: int) -> int:
        """Multiplies."""
        return a * b

    async def work(proxy: Any) -> None:
        proxy.engine.says(f"{CALL}<|im_end|>", "56<|im_end|>")
        rollout = await proxy.open()
        client = rollout.gemini()
        answer = await client.models.generate_content(
            model="m", contents="7*8?", config={"tools": [calc]}
        )
        assert answer.text == "56"
        assert [turn.fork for turn in rollout.turns()] == [Fork.ROOT, Fork.NONE]
        shown = proxy.engine.vocabulary.decode(proxy.engine.requests[1].prompt_token_ids)
        assert "<tool_response>\n56\n" in shown
        await client.aclose()

    proxied(work)


def test_why_it_stopped_candidates_and_logprobs(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says("abcdef<|im_end|>")
        rollout = await proxy.open()
        client = rollout.gemini()

        async def ask(**config: Any) -> Any:
            return await client.models.generate_content(model="m", contents="?", config=config)

        answer = await ask(max_output_tokens=3, candidate_count=2, response_logprobs=True)
        assert [candidate.finish_reason for candidate in answer.candidates] == ["MAX_TOKENS"] * 2
        chosen = answer.candidates[1].logprobs_result.chosen_candidates
        assert [token.token for token in chosen] == list("abc")
        assert (await ask(stop_sequences=["d"])).text == "abc"
        assert len(rollout.turns()) == 3
        await client.aclose()

    proxied(work)


def test_errors_are_the_sdks(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open()

        async def refused(kind: Any, status: str, client: Any, **asked: Any) -> Any:
            asked = {"model": "m", "contents": "?"} | asked
            with pytest.raises(kind) as caught:
                await client.models.generate_content(**asked)
            assert caught.value.status == status
            return caught.value

        retried = rollout.gemini(retry_options={"attempts": 3, "initial_delay": 0.01})
        bad, broken = errors.ClientError, errors.ServerError
        error = await refused(bad, "INVALID_ARGUMENT", retried, contents="seven " * 100)
        assert "exceeds the maximum number of tokens" in error.message
        search: Any = {"tools": [{"google_search": {}}]}
        error = await refused(bad, "INVALID_ARGUMENT", retried, config=search)
        assert "tools[0].googleSearch" in error.message
        with pytest.raises(errors.ClientError, match="embeddings"):
            await retried.models.embed_content(model="m", contents="x")
        assert sum((await proxy.stats())["num_rejected"].values()) == 3
        stranger = rollout.gemini(api_key="nobody's")
        assert (await refused(bad, "UNAUTHENTICATED", stranger)).code == 401
        client = rollout.gemini()
        proxy.engine.fail = "out of memory"
        await refused(broken, "INTERNAL", client)
        await proxy.engine_server.close()  # it may come back, within the call's limit
        await refused(broken, "DEADLINE_EXCEEDED", client)
        for each in (retried, stranger, client):
            await each.aclose()

    proxied(work, max_model_len=64, request_timeout_s=3.0)


def test_paths_keys_and_the_array_form(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        key = rollout.key
        body = {"contents": [{"parts": [{"text": "?"}]}]}
        async with httpx.AsyncClient(base_url=proxy.url) as http:
            for path, headers in (
                ("/v1beta/models/m:generateContent", {"x-goog-api-key": key}),
                (f"/v1/models/org/m:generateContent?key={key}", {}),
                (f"/k/{key}/v1beta/models/m:generateContent", {"x-goog-api-key": "hard-coded"}),
            ):
                answer = await http.post(path, json=body, headers=headers)
                assert answer.json()["candidates"][0]["content"]["parts"] == [{"text": "ok"}]
            path = f"/v1beta/models/m:streamGenerateContent?key={key}"
            answer = await http.post(path, json=body)
            assert answer.headers["content-type"] == "application/json"
            texts = [each["candidates"][0]["content"]["parts"][0]["text"] for each in answer.json()]
            assert "".join(texts) == "ok"
            counted = {"generateContentRequest": {**body, "model": "models/m"}}
            answer = await http.post(f"/v1beta/models/m:countTokens?key={key}", json=counted)
            assert answer.json()["totalTokens"] > 0
            for path, status in (
                ("/v1beta/nothing", 404),
                (f"/v1beta/models/m:fly?key={key}", 404),
                (f"/v1beta/models/%7Btarget:path%7D?key={key}", 404),
                ("/v1beta/models/m:generateContent", 401),
            ):
                answer = await http.post(path, json=body)
                assert (answer.status_code, answer.json()["error"]["code"]) == (status, status)
        client = rollout.gemini()
        assert (await client.models.get(model="x")).name == "models/x"
        assert [model.name async for model in await client.models.list()] == ["models/policy"]
        await client.aclose()

    proxied(work)


def parse(**body: Any) -> Any:
    body = {"contents": [{"parts": [{"text": "?"}]}]} | body
    return gemini.parse(Asked(json.dumps(body).encode(), {"target": "m:generateContent"}))


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"contents": []}, "contents"),
        ({"contents": [{"parts": []}]}, "contents"),
        ({"contents": [{"role": "model", "parts": [{"text": "x"}]}]}, "contents"),
        ({"contents": [{"role": "wizard"}]}, "contents[0].role"),
        ({"contents": [{"parts": [{"inline_data": {}}]}]}, "contents[0].parts[0]"),
        (
            {"contents": [{"parts": [{"functionResponse": {}}]}]},
            "contents[0].parts[0].functionResponse.name",
        ),
        ({"tools": [{"codeExecution": {}}]}, "tools[0].codeExecution"),
        ({"tools": [{"functionDeclarations": [{}]}]}, "tools[0].functionDeclarations[0].name"),
        (
            {"toolConfig": {"functionCallingConfig": {"mode": "SOME"}}},
            "toolConfig.functionCallingConfig.mode",
        ),
        (
            {"generationConfig": {"responseMimeType": "text/x.enum"}},
            "generationConfig.responseMimeType",
        ),
        (
            {"generationConfig": {"responseModalities": ["IMAGE"]}},
            "generationConfig.responseModalities",
        ),
        ({"generation_config": {"max_output_tokens": 0}}, "maxOutputTokens"),
        ({"cachedContent": "cachedContents/x"}, "cachedContent"),
    ],
)
def test_invalid_requests_name_the_field(change: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as caught:
        parse(**change)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert param in json.loads(gemini.error_body(caught.value))["error"]["message"]


def test_nulls_both_spellings_and_calls_without_ids() -> None:
    contents = [
        {"role": "user", "parts": [{"text": "?"}]},
        {"role": "model", "parts": [{"functionCall": {"name": n}} for n in ("f", "g", "f")]},
        {"parts": [{"function_response": {"name": n, "response": {}}} for n in ("f", "f", "g")]},
    ]
    config = {"maxOutputTokens": None, "top_k": 3.0, "stop_sequences": ["x"], "seed": 1}
    call = parse(contents=contents, generation_config=config, safetySettings=[], tools=None)
    assert [(c.name, c.id) for c in call.messages[1].tool_calls] == [
        ("f", "call_1"),
        ("g", "call_2"),
        ("f", "call_3"),
    ]
    assert [m.tool_call_id for m in call.messages[2:]] == ["call_1", "call_3", "call_2"]
    assert (call.top_k, call.stop, call.max_new_tokens) == (3, ("x",), None)
