"""From a call that was parsed to the bytes of its answer, whole or streamed, in any dialect.

An agent that hangs up ends what it asked for. Called by `app.py`.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import ExitStack, aclosing
from dataclasses import replace

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from areal_sub.proxy.connection import until_hung_up
from areal_sub.proxy.dialects import JSON, Dialect
from areal_sub.proxy.kept import Kept
from areal_sub.proxy.neutral import Call, Choice, Delta, Usage
from areal_sub.proxy.refusals import Refusal
from areal_sub.proxy.sessions import Session
from areal_sub.proxy.turns import Prepared, Turns

# Stainless's SDKs (OpenAI's, Anthropic's, those on top of them) count here what they repeat.
RETRY_HEADER = b"x-stainless-retry-count"
MAX_RETRY_DIGITS = 3

Deltas = AsyncIterator[tuple[int, Delta]]


async def answer_call(
    request: Request, turns: Turns, session: Session, dialect: Dialect, call: Call
) -> Response:
    """Raises `Refusal` where it happens before the first token, and `ClientDisconnect`."""
    if retry := _retry(request):
        call = replace(call, retry=retry)
    prepared = await turns.prepare(session, call, dialect.ID_PREFIX + secrets.token_hex(14))
    answering = _Answering(dialect, prepared)
    if call.stream:
        deltas = turns.run(prepared)
        with until_hung_up(request):
            first = await anext(deltas)
        return EventStream(request, answering, first, deltas)
    with until_hung_up(request):
        await turns.answer(prepared, answering.add)
    return Response(answering.body(), 200, request_headers(dialect), JSON)


def _retry(request: Request) -> int:
    """How often the client says to have made this very call before. It is only ever a reason to
    leave the client's own tokens out."""
    count = header(request, RETRY_HEADER)
    is_number = count.isdigit() and len(count) <= MAX_RETRY_DIGITS
    return int(count) if is_number else 0


def header(request: Request, name: bytes) -> bytes:
    """The value of one header, or nothing; `request.headers` would make a mapping of all."""
    return next((value for key, value in request.scope["headers"] if key == name), b"")


def request_headers(dialect: Dialect) -> dict[str, str]:
    return {dialect.REQUEST_ID: f"req_{secrets.token_hex(12)}"}


class _Answering:
    """One answer on its way: what it consists of, in its dialect."""

    def __init__(self, dialect: Dialect, prepared: Prepared) -> None:
        self.dialect = dialect
        self.prepared = prepared
        self._choices = [Choice() for _ in range(prepared.call.num_choices)]

    def add(self, index: int, delta: Delta) -> None:
        self._choices[index].add(delta)

    def usage(self) -> Usage:
        return Usage(self.prepared.prompt.num_tokens, self.prepared.num_sampled_tokens)

    def body(self) -> bytes:
        """The whole answer; kept where a later call may go on from it. At the end, once."""
        prepared, call = self.prepared, self.prepared.call
        body = self.dialect.answer(prepared.answer_id, call, self._choices, self.usage())
        if call.conversation is not None:
            conversation = (*call.conversation, self._choices[0].message())
            kept = Kept(conversation, body, call.num_bytes + len(body))
            prepared.session.kept.add(prepared.answer_id, kept)
        return body


class EventStream(Response):
    def __init__(
        self, request: Request, answering: _Answering, first: tuple[int, Delta], deltas: Deltas
    ) -> None:
        prepared, dialect = answering.prepared, answering.dialect
        self._stream = dialect.stream(prepared.answer_id, prepared.call, prepared.prompt.num_tokens)
        headers = {"cache-control": "no-cache", **request_headers(dialect)}
        super().__init__(media_type=self._stream.media_type, headers=headers)
        del self.headers["content-length"]
        self._request = request
        self._answering = answering
        self._first = first
        self._deltas = deltas
        self._held = ExitStack()

    def hold(self, held: ExitStack) -> None:
        """What the call takes of its rollout, until the last of its answer is sent: who does not
        read it has the proxy keep all of it."""
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._held:
                async with aclosing(self._deltas):  # type: ignore[type-var]
                    with until_hung_up(self._request):
                        await self._send_all(send)
        except ClientDisconnect:
            return

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        stream, answering = self._stream, self._answering
        is_kept = answering.prepared.call.conversation is not None

        async def send_events(index: int, delta: Delta, is_first: bool = False) -> None:
            if is_kept:
                answering.add(index, delta)
            body = b"".join(stream.events(index, delta))
            if body or is_first:  # without events, that is the head, which waits for a body
                await send({"type": "http.response.body", "body": body, "more_body": True})

        try:
            await send_events(*self._first, is_first=True)
            async for index, delta in self._deltas:
                await send_events(index, delta)
            if is_kept:
                answering.body()
            last = stream.end(answering.usage())
        except Refusal as refusal:
            last = stream.failure(refusal)
        await send({"type": "http.response.body", "body": last})
