"""The agent plane: the routes that agents can reach.

    /v1/chat/completions   /v1/models   /v1/models/{name}

each also without `/v1`, and each below `/k/{key}` for agents that hard-code an API key. The key is
read from there, from `Authorization: Bearer` and from `x-api-key`. Everything that can be reached
here is a hostile agent's to use: bodies are bounded and read under a deadline, and nothing about
another rollout can be asked, not even whether it exists. Where the connection has an owner
(`listeners`), it says which rollout is calling, and the key is a second factor. Opening and ending
rollouts is `control.py`'s, on another socket.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from areal_sub.proxy.dialects import chat
from areal_sub.proxy.listeners import STATE_KEY
from areal_sub.proxy.neutral import Choice, Delta, Usage
from areal_sub.proxy.refusals import Reason, Refusal
from areal_sub.proxy.sessions import KeyMisuse, Session, Sessions
from areal_sub.proxy.tampering import sign_of_route
from areal_sub.proxy.turns import Prepared, Turns

T = TypeVar("T")

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 16 * 2**20
BODY_TIMEOUT_S = 60.0
# A reader of a stream that stops reading is let go after this long.
SEND_TIMEOUT_S = 300.0

_PATH_KEY = re.compile(r"/k/([^/]+)")

Endpoint = Callable[[Request, Session], Awaitable[Response]]


def make_app(sessions: Sessions, turns: Turns) -> FastAPI:
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)

    async def chat_completions(request: Request, session: Session) -> Response:
        call = chat.parse(await read_body(request))
        prepared = await turns.prepare(session, call)
        answer = event_stream if call.stream else whole_answer
        return await answer(request, prepared, turns.run(prepared))

    async def models(request: Request, session: Session) -> Response:
        return _json({"object": "list", "data": [_model("policy")]})

    async def model(request: Request, session: Session) -> Response:
        return _json(_model(request.path_params["name"]))

    routes: list[tuple[str, str, Endpoint]] = [
        ("POST", "/chat/completions", chat_completions),
        ("GET", "/models", models),
        ("GET", "/models/{name:path}", model),
    ]
    for base in ("", "/v1", "/k/{key}", "/k/{key}/v1"):
        for method, path, endpoint in routes:
            app.add_route(base + path, _guarded(sessions, endpoint), methods=[method])

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = f"{request.method} {request.url.path}"
        if error.status_code == 405:
            refusal = Refusal(Reason.WRONG_METHOD, f"Not allowed: {what}")
        else:
            refusal = Refusal(Reason.UNKNOWN_ROUTE, f"Invalid URL ({what})")
            _note_route(sessions, request)
        sessions.num_rejected[refusal.reason] += 1
        return _refused(refusal)

    app.add_exception_handler(HTTPException, on_http_error)
    return app


def _guarded(sessions: Sessions, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    """`endpoint` for authenticated calls; refusals become error bodies and are counted."""

    async def call(request: Request) -> Response:
        session: Session | None = None
        refusal: Refusal
        try:
            session = sessions.authenticate(
                request.path_params.get("key"),
                header_keys(request),
                _owner(request),
            )
            return await endpoint(request, session)
        except KeyMisuse as misuse:
            refusal = misuse
            what = f"{request.method} {request.url.path}"
            sessions.note(misuse.sign, what, misuse.callers, _owner(request) or "")
        except Refusal as error:
            refusal = error
        except ClientDisconnect:
            return Response(status_code=499)  # nobody is there to read it
        except Exception:
            log.exception("%s %s failed", request.method, request.url.path)
            refusal = Refusal(Reason.INTERNAL, "the proxy failed; see its log")
        sessions.num_rejected[refusal.reason] += 1
        if session is not None:
            session.num_rejected += 1
        return _refused(refusal)

    return call


def _owner(request: Request) -> str | None:
    """Whose connection it came by, where connections have an owner."""
    owner: str | None = request.scope.get("state", {}).get(STATE_KEY)
    return owner


def _note_route(sessions: Sessions, request: Request) -> None:
    path, owner = request.url.path, _owner(request)
    caller = sessions.caller(owner, [*_PATH_KEY.findall(path)[:1], *header_keys(request)])
    callers = [caller] if caller is not None else []
    sessions.note(sign_of_route(path), f"{request.method} {path}", callers, owner or "")


def header_keys(request: Request) -> list[str]:
    keys = []
    for name, value in request.scope["headers"]:
        if name == b"authorization":
            scheme, _, key = value.decode("latin-1").partition(" ")
            if scheme.lower() == "bearer":
                keys.append(key.strip())
        elif name == b"x-api-key":
            keys.append(value.decode("latin-1").strip())
    return keys


async def read_body(request: Request) -> bytes:
    """The whole body. Raises `Refusal` where it is too large or too slow, `ClientDisconnect`."""
    too_large = Refusal(Reason.TOO_LARGE, f"The request is larger than {MAX_BODY_BYTES} bytes.")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > MAX_BODY_BYTES:
        raise too_large
    parts: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                num_bytes += len(part)
                if num_bytes > MAX_BODY_BYTES:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise Refusal(
            Reason.INVALID_REQUEST, f"The request did not arrive within {BODY_TIMEOUT_S} s."
        ) from None
    return b"".join(parts)


Deltas = AsyncIterator[tuple[int, Delta]]


async def whole_answer(request: Request, prepared: Prepared, deltas: Deltas) -> Response:
    """All choices at once. Raises `Refusal`, and `ClientDisconnect` where the agent hung up."""
    choices = [Choice() for _ in range(prepared.call.num_choices)]

    async def collect() -> None:
        async with aclosing(deltas):  # type: ignore[type-var]
            async for index, delta in deltas:
                choices[index].add(delta)

    await unless_disconnected(request.receive, collect())
    body = chat.answer(prepared.completion_id, prepared.call, choices, usage(prepared))
    return Response(body, media_type="application/json")


async def event_stream(request: Request, prepared: Prepared, deltas: Deltas) -> Response:
    """Server-sent events. Raises as `whole_answer` where it happens before the first delta."""
    first = await unless_disconnected(request.receive, _next(deltas))
    return _EventStream(prepared, first, deltas)


async def _next(deltas: Deltas) -> tuple[int, Delta]:
    return await anext(deltas)


class _EventStream(Response):
    def __init__(self, prepared: Prepared, first: tuple[int, Delta], deltas: Deltas) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._prepared = prepared
        self._first = first
        self._deltas = deltas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(self._deltas):  # type: ignore[type-var]
                await unless_disconnected(receive, self._send_all(send))
        except (ClientDisconnect, TimeoutError):
            return

    async def _send_all(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(head)
        stream = chat.Stream(self._prepared.completion_id, self._prepared.call)

        async def send_events(index: int, delta: Delta) -> None:
            body = b"".join(stream.events(index, delta))
            if body:
                await _send_body(send, body, more=True)

        try:
            await send_events(*self._first)
            async for index, delta in self._deltas:
                await send_events(index, delta)
            last = stream.end(usage(self._prepared))
        except Refusal as refusal:
            last = stream.failure(refusal)
        await _send_body(send, last, more=False)


async def _send_body(send: Send, body: bytes, *, more: bool) -> None:
    async with asyncio.timeout(SEND_TIMEOUT_S):
        await send({"type": "http.response.body", "body": body, "more_body": more})


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """`work`'s result; `work` is cancelled and `ClientDisconnect` raised if the agent hangs up."""
    working = asyncio.ensure_future(work)
    hanging_up = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, hanging_up}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, hanging_up):
            task.cancel()
        await asyncio.gather(working, hanging_up, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def usage(prepared: Prepared) -> Usage:
    return Usage(prepared.prompt.num_tokens, prepared.num_sampled_tokens)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "areal-sub"}


def _json(body: Any) -> Response:
    return Response(orjson.dumps(body), media_type="application/json")


def _refused(refusal: Refusal) -> Response:
    # The causes do not go away by asking again; SDKs of OpenAI's make heed this header.
    headers = {"x-should-retry": "false"}
    return Response(
        chat.error_body(refusal), refusal.status, headers, media_type="application/json"
    )
