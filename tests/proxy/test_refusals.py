"""Calls that are refused: by key, by limit, by form, by what is broken behind the proxy."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
from typing import Any

import openai
import pytest

from areal_sub.proxy import refusals
from areal_sub.proxy.dialects import Asked, chat
from areal_sub.proxy.refusals import Refusal
from areal_sub.rpc import Server

MESSAGES = [{"role": "user", "content": "?"}]


async def post(
    proxy: Any, path: str, body: bytes, headers: dict[str, str] | None = None, method: str = "POST"
) -> tuple[int, dict[str, Any]]:
    """A bare request on a connection of its own: (status, error)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    lines = [f"{method} {path} HTTP/1.1", "host: x", "connection: close"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    lines += [f"content-length: {len(body)}"]
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
    raw = await reader.read()
    writer.close()
    await writer.wait_closed()
    head, _, payload = raw.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(payload)["error"]


def test_keys(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        one, two, gone = [await proxy.open() for _ in range(3)]
        await gone.end()

        async def refused(base: str, **headers: str) -> str:
            body = json.dumps({"messages": MESSAGES}).encode()
            path = f"{base}/chat/completions"
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            status, error = await post(proxy, path, body, named)
            assert (status, error["code"]) == (401, "invalid_api_key")
            return str(error["message"])

        assert "no rollout's" in await refused("/v1")
        assert "no rollout's" in await refused("/v1", authorization="Bearer sk-other")
        assert "no rollout's" in await refused("/k/nonsense/v1", authorization=f"Bearer {one.key}")
        assert "ended" in await refused("/v1", authorization=f"Bearer {gone.key}")
        assert "ended" in await refused(f"/k/{gone.key}/v1")
        other = "belongs to another"
        assert other in await refused(f"/k/{one.key}/v1", authorization=f"Bearer {two.key}")
        assert other in await refused(f"/k/{one.key}/v1", x_api_key=gone.key)
        assert other in await refused("/v1", authorization=f"Bearer {one.key}", x_api_key=two.key)
        stats = await proxy.stats()
        assert stats["num_rejected"] == {"unknown_key": 3, "finished_key": 2, "foreign_key": 3}
        assert stats["num_open"] == 2
        await one.end()
        assert proxy.records()[-1].num_rejected_calls == 3
        assert proxy.engine.requests == []

    proxied(work)


def test_a_compressed_body_is_refused_as_one(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        body = gzip.compress(json.dumps({"model": "m", "messages": MESSAGES}).encode())
        path = f"/k/{rollout.key}/v1/chat/completions"
        status, error = await post(proxy, path, body, {"Content-Encoding": "gzip"})
        assert (status, error["type"]) == (400, "invalid_request_error")
        assert error["message"] == "The body is encoded (gzip): send it as it is."
        await rollout.end()

    proxied(work)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "wizard", "content": ""}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "user", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
            "messages[0].tool_calls[0].function.name",
        ),
        ({"messages": MESSAGES * 5000}, "messages"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"n": 10**30}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": "0.5"}, "top_p"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stream": 1}, "stream"),
        ({"model": "m" * 300}, "model"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.name"),
        ({"top_logprobs": 5}, "top_logprobs"),
    ],
)
def test_invalid_requests_name_the_field(change: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as caught:
        body = json.dumps({"model": "m", "messages": MESSAGES} | change).encode()
        chat.parse(Asked(body))
    assert (caught.value.status, caught.value.param) == (400, param)
    assert json.loads(chat.error_body(caught.value))["error"]["type"] == "invalid_request_error"


def test_nulls_and_unknown_fields_are_taken() -> None:
    known = "tools tool_choice n stop max_tokens stream stream_options temperature model logprobs"
    body: dict[str, Any] = dict.fromkeys(known.split())
    body |= {"messages": [{"role": "developer", "content": None, "name": None}], "store": False}
    call = chat.parse(Asked(json.dumps(body).encode()))
    assert (call.messages[0].role, call.messages[0].content) == ("system", "")
    assert (call.num_choices, call.stop, call.max_new_tokens) == (1, (), None)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body["messages"] = [{"role": "user", "content": parts}]
    assert chat.parse(Asked(json.dumps(body).encode())).messages[0].content == "ab"


def test_what_is_quoted_is_bounded() -> None:
    """An answer that nobody reads stays in memory for minutes, and escapes are longer still."""
    body = {"messages": MESSAGES, "response_format": {"type": "\1" * 2**20}}
    with pytest.raises(Refusal) as caught:
        chat.parse(Asked(json.dumps(body).encode()))
    assert 1000 < len(str(caught.value)) <= refusals.MAX_MESSAGE_CHARS
    assert len(chat.error_body(caught.value)) < 10_000


def test_hostile_bodies(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        path, key = "/v1/chat/completions", {"authorization": f"Bearer {rollout.key}"}
        for body in (
            b"",
            b"[]",
            b"\xff\xfe",
            b"{" * 100_000,
            b'{"messages":' + b"[" * 100_000,
            json.dumps({"messages": MESSAGES, "x": json.loads("[" * 70 + "]" * 70)}).encode(),
            b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
            b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        ):
            status, error = await post(proxy, path, body, key)
            assert (status, error["type"]) == (400, "invalid_request_error")
        for path, kind, value in (
            ("/v1/responses", "type", "invalid_request_error"),
            ("/v1/completions", "type", "invalid_request_error"),
            ("/v1/messages", "type", "invalid_request_error"),
            ("/v1/messages/count_tokens", "type", "invalid_request_error"),
            ("/v1beta/models/m:generateContent", "status", "INVALID_ARGUMENT"),
            ("/v1beta/models/m:countTokens", "status", "INVALID_ARGUMENT"),
        ):
            for body in (b"", b"[]", b"\xff", b'{"x":' + b"[" * 100_000, b"{}"):
                status, error = await post(proxy, path, body, key)
                assert (status, error[kind]) == (400, value)
        path = "/v1/chat/completions"
        async with rollout.client() as client:
            with pytest.raises(openai.APIStatusError) as caught:
                large: Any = [{"role": "user", "content": "x" * 2**24}]
                await client.chat.completions.create(model="m", messages=large)
            assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")
        deep = '{"a":' * 100 + "1" + "}" * 100
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": deep}}
        body = json.dumps({"messages": [*MESSAGES, {"role": "assistant", "tool_calls": [call]}]})
        status, error = await post(proxy, path, body.encode(), key)
        assert (status, error["param"]) == (400, "messages[1].tool_calls[0].function.arguments")
        assert (await post(proxy, "/v1/nothing", b"{}", key))[0] == 404
        assert (await post(proxy, "/docs", b"", key, "GET"))[0] == 404
        assert (await post(proxy, "/control/open_rollout", b"{}", key))[0] == 404
        assert (await post(proxy, path, b"", key, "GET"))[0] == 405
        stats = await proxy.stats()
        assert stats["num_rejected"]["unknown_route"] == 3
        assert stats["num_requests"] == 0

    proxied(work)


def test_an_endless_head_and_malformed_http_end_the_connection(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        for start, more in ((b"GET / HTTP/1.1\r\nx: ", b"y" * 65536), (b"\x16\x03 hello\r\n", b"")):
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            closed = asyncio.ensure_future(reader.read())
            writer.write(start)
            num_sent = 0
            with contextlib.suppress(ConnectionError):
                while more and not closed.done():
                    writer.write(more)
                    await writer.drain()
                    num_sent += len(more)
                    assert num_sent < 2**25  # far more than lies in the buffers between
            await asyncio.wait({closed})
            with contextlib.suppress(ConnectionError):
                assert closed.result().startswith(b"HTTP/1.1 400 ")
            writer.close()

    proxied(work)


def test_context_length_is_the_dialects_own_error(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        async with rollout.client(max_retries=3) as client:
            create = client.chat.completions.create
            for text in ("seven " * 100, "x" * 10**7):
                with pytest.raises(openai.BadRequestError) as caught:
                    await create(model="m", messages=[{"role": "user", "content": text}])
                assert caught.value.code == "context_length_exceeded"
            await create(model="m", messages=[{"role": "user", "content": "seven"}])
        [request] = proxy.engine.requests
        assert len(request.prompt_token_ids) + request.max_new_tokens == 64

    proxied(work, max_model_len=64)


def test_turn_limit_is_not_retried(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open(max_turns=3)
        async with rollout.client(max_retries=5) as client:
            create = client.chat.completions.create
            with pytest.raises(openai.BadRequestError):
                await create(model="m", messages=MESSAGES, n=4)
            await create(model="m", messages=MESSAGES, n=2)
            with pytest.raises(openai.BadRequestError) as caught:
                await create(model="m", messages=MESSAGES, n=2)
            assert caught.value.code == "rollout_turn_limit"
            await create(model="m", messages=MESSAGES)
        await rollout.end()
        assert proxy.records()[-1].num_rejected_calls == 2
        assert proxy.records()[-1].num_turns == 3

    proxied(work)


def test_engine_failures(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        rollout = await proxy.open()
        async with rollout.client(max_retries=2) as client:
            create = client.chat.completions.create
            proxy.engine.fail = "out of memory"
            with pytest.raises(openai.InternalServerError) as caught:
                await create(model="m", messages=MESSAGES)
            assert caught.value.status_code == 502
            assert "out of memory" in str(caught.value)
            await proxy.engine_server.close()
            for stream in (False, True):
                with pytest.raises(openai.InternalServerError) as caught:
                    await create(model="m", messages=MESSAGES, stream=stream)
                assert caught.value.status_code == 504, "it may come back, within the call's limit"
                assert "engine" in str(caught.value)
        ended = await rollout.end(outcome="exception", reward=None)
        assert ended["outcome"] == "lost", "not the agent's fault"

    proxied(work, request_timeout_s=3.0)


def test_the_next_engine_goes_on_in_mid_stream(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says("abc<|im_end|>", "c<|im_end|>")
        reached = asyncio.Event()

        async def gate(position: int) -> None:
            if position == 2:
                reached.set()
                await asyncio.Event().wait()

        proxy.engine.gate = gate
        rollout = await proxy.open()
        async with rollout.client() as client:
            stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
            await reached.wait()
            await proxy.engine_server.close()
            proxy.engine.gate = None
            handlers = {"info": proxy.engine.info, "generate": proxy.engine.generate}
            proxy.engine_server = Server(proxy.engine_server.path, handlers)
            await proxy.engine_server.start()
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        await proxy.engine_server.close()
        assert text == "abc"
        first, second = proxy.engine.requests
        [turn] = rollout.turns()
        assert (turn.finish_reason, len(turn.token_ids)) == ("stop", 4)
        assert second.prompt_token_ids.tolist() == [
            *first.prompt_token_ids.tolist(),
            *turn.token_ids[:2].tolist(),
        ]
        assert second.max_new_tokens == first.max_new_tokens - 2

    proxied(work)


def test_deadline(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        async def gate(position: int) -> None:
            await asyncio.Event().wait()

        proxy.engine.gate = gate
        rollout = await proxy.open()
        async with rollout.client(max_retries=5) as client:
            with pytest.raises(openai.InternalServerError) as caught:
                await client.chat.completions.create(model="m", messages=MESSAGES)
        assert caught.value.status_code == 504
        assert len(proxy.engine.requests) == 1
        await proxy.engine.until(lambda: proxy.engine.num_aborted == 1)

    proxied(work, request_timeout_s=0.05)


def test_ending_a_rollout_aborts_what_runs_and_its_record_is_the_last(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says("abc<|im_end|>")
        reached = asyncio.Event()

        async def gate(position: int) -> None:
            if position == 2:
                reached.set()
                await asyncio.Event().wait()

        proxy.engine.gate = gate
        rollout = await proxy.open()
        async with rollout.client() as client:
            stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
            await reached.wait()
            ended = await rollout.end(outcome="timeout", reward=None)
            assert ended == {"outcome": "timeout", "num_turns": 1}
            await proxy.engine.until(lambda: proxy.engine.num_aborted == 1)
            with pytest.raises(openai.APIError, match="ended"):
                async for _ in stream:
                    pass
            with pytest.raises(openai.AuthenticationError):
                await client.chat.completions.create(model="m", messages=MESSAGES)
        assert [record.KIND for record in proxy.records()] == ["open", "intent", "turn", "end"]

    proxied(work)


@pytest.mark.parametrize("num_choices", [1, 2])
def test_ending_a_rollout_refuses_the_whole_answers_that_are_awaited(
    proxied: Any, num_choices: int
) -> None:
    async def work(proxy: Any) -> None:
        reached = asyncio.Event()

        async def gate(position: int) -> None:
            reached.set()
            await asyncio.Event().wait()

        proxy.engine.gate = gate
        rollout = await proxy.open()
        async with rollout.client() as client:
            asking = asyncio.ensure_future(
                client.chat.completions.create(model="m", messages=MESSAGES, n=num_choices)
            )
            await reached.wait()
            await rollout.end(outcome="timeout", reward=None)
            with pytest.raises(openai.AuthenticationError, match="ended"):
                await asking
            await proxy.engine.until(lambda: proxy.engine.num_aborted == num_choices)
        kinds = [record.KIND for record in proxy.records()]
        assert kinds == ["open", *["intent"] * num_choices, "end"]

    proxied(work)


def test_a_stream_that_is_never_read_delays_nobody(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        proxy.engine.says([65] * 3000)  # more than a connection buffers by far
        stuck, other = await proxy.open(max_new_tokens=3000), await proxy.open()
        body = json.dumps({"messages": MESSAGES, "stream": True, "logprobs": True}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port, limit=1)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
            + f"authorization: Bearer {stuck.key}\r\ncontent-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        await proxy.engine.until(
            lambda: bool(proxy.engine.sampled) and not proxy.engine.num_running
        )
        proxy.engine.says("ok<|im_end|>")
        async with other.client() as client:
            await client.chat.completions.create(model="m", messages=MESSAGES)
        assert (await stuck.end())["num_turns"] == 1
        writer.close()
        assert reader is not None

    proxied(work)


def test_rewards_are_checked_against_the_turns(proxied: Any) -> None:
    async def work(proxy: Any) -> None:
        async def ended(asks: bool, **end: Any) -> Any:
            rollout = await proxy.open()
            if asks:
                async with rollout.client() as client:
                    answer = await client.chat.completions.create(model="m", messages=MESSAGES)
                if "turn_rewards" in end:
                    mine = {answer.id: 1.0}
                    end["turn_rewards"] = mine | end["turn_rewards"]
            await rollout.end(**end)
            return proxy.records()[-1]

        end = await ended(True, reward=None, turn_rewards={"chatcmpl-nobody": 1.0})
        assert end.outcome == "invalid_result"
        assert "chatcmpl-nobody" in end.error
        assert "of the whole rollout is a number by itself" in end.error
        assert end.turn_rewards == {}
        end = await ended(True, reward=None, turn_rewards={})
        assert end.outcome == "completed"
        assert list(end.turn_rewards.values()) == [1.0]
        assert (await ended(False, reward=1.0)).outcome == "no_turns"
        assert (await ended(False, reward=None, turn_rewards={"x": 1.0})).outcome == "no_turns"
        assert (await ended(True, reward=float("nan"))).outcome == "invalid_result"
        end = await ended(True, outcome="exception", reward=None, error="ValueError: x")
        assert (end.outcome, end.error, end.num_turns) == ("exception", "ValueError: x", 1)

    proxied(work)
