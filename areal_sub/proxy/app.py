"""The agent plane: what agents can reach.

The routes are `routes.py`'s; here is what every call goes through: its key, its body, and the error
body of its dialect where it is refused. The key is read from the path, `Authorization: Bearer`,
`x-api-key`, `x-goog-api-key` and `?key=`. Everything that can be reached here is a hostile agent's
to use: bodies are bounded and read under a deadline, and nothing about another rollout can be
asked, not even whether it exists. Where the connection has an owner (`listeners`), it says which
rollout is calling, and the key is a second factor. Opening and ending rollouts is `control.py`'s,
on another socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Awaitable, Callable

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route as StarletteRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from areal_sub.proxy.answering import EventStream, header, request_headers
from areal_sub.proxy.connection import has_arrived
from areal_sub.proxy.dialects import JSON, Asked, Dialect
from areal_sub.proxy.listeners import STATE_KEY
from areal_sub.proxy.refusals import Reason, Refusal, invalid
from areal_sub.proxy.routes import BASES, BETA_BASES, KEYED, Endpoint, dialect_of, make_routes
from areal_sub.proxy.sessions import KeyMisuse, Session, Sessions
from areal_sub.proxy.tampering import sign_of_route
from areal_sub.proxy.turns import Turns

log = logging.getLogger(__name__)

Called = Callable[[Request], Awaitable[Response]]

MAX_BODY_BYTES = 16 * 2**20
# SDKs send one, some two; looking at each takes time that is everybody's.
MAX_KEYS = 8
# Of a query: SDKs send one or two.
MAX_PARAMETERS = 64
BODY_TIMEOUT_S = 60.0
# To make tokens of more text takes the loop, which is everybody's, more than a millisecond or two.
LONG_BYTES = 4096

_PATH_KEY = re.compile(r"/k/([^/]+)")


def make_app(sessions: Sessions, turns: Turns) -> ASGIApp:
    """FastAPI, but calls of models at fixed paths, which are nearly all, go past its layers: those
    would cost as much as rendering and tokenizing the prompt."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    posted: dict[str, Called] = {}

    async def alive(request: Request) -> Response:
        return Response()  # SDKs look whether somebody is there, without a key

    routes = make_routes(turns)
    for route in routes:
        endpoint = _guarded(sessions, route.dialect, route.endpoint)
        served = StarletteRoute(route.path, endpoint, methods=[route.method])
        assert served.methods is not None
        served.methods.discard("HEAD")  # which GET brings along
        app.router.routes.append(served)
        if route.method == "POST" and "{" not in route.path.removeprefix(KEYED):
            posted[route.path] = endpoint
    probed = [base or "/" for base in (*BASES, *BETA_BASES)]
    for path in dict.fromkeys([*probed, *(route.path for route in routes)]):
        app.add_route(path, alive, methods=["HEAD"])

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = f"{request.method} {request.url.path}"
        if error.status_code == 405:
            refusal = Refusal(Reason.WRONG_METHOD, f"Not allowed: {what}")
        else:
            refusal = Refusal(Reason.UNKNOWN_ROUTE, f"Invalid URL ({what})")
            _note_route(sessions, request)
        sessions.num_rejected[refusal.reason] += 1
        return _refused(refusal, dialect_of(request.url.path))

    app.add_exception_handler(HTTPException, on_http_error)

    async def agents(scope: Scope, receive: Receive, send: Send) -> None:
        path, parameters = _keyless(scope["path"])
        endpoint = posted.get(path) if scope["method"] == "POST" else None
        if endpoint is None:
            await app(scope, receive, send)
            return
        scope["path_params"] = parameters
        response = await endpoint(Request(scope, receive, send))
        await response(scope, receive, send)

    return agents


def _keyless(path: str) -> tuple[str, dict[str, str]]:
    """The route of `path`, where that is fixed but for the key, and the key."""
    given = _PATH_KEY.match(path)
    if given is None:
        return path, {}
    return KEYED + path[given.end() :], {"key": given[1]}


def _guarded(sessions: Sessions, dialect: Dialect, endpoint: Endpoint) -> Called:
    """`endpoint` for authenticated calls; refusals become error bodies and are counted."""

    async def call(request: Request) -> Response:
        session: Session | None = None
        refusal: Refusal
        try:
            if not _has_short_query(request):
                raise invalid(f"The query has more than {MAX_PARAMETERS} parameters.")
            session = sessions.authenticate(
                request.path_params.get("key"),
                given_keys(request),
                _owner(request),
            )
            with contextlib.ExitStack() as held:
                take = held.enter_context(session.calling())
                raw = await read_body(request, take) if request.method == "POST" else b""
                await session.take_turn(is_long=len(raw) > LONG_BYTES)
                asked = Asked(
                    raw=raw,
                    path=request.path_params,
                    query=request.query_params if request.scope["query_string"] else {},
                    kept=session.kept,
                    seen=session.seen,
                )
                response = await endpoint(request, session, asked)
                if isinstance(response, EventStream):
                    response.hold(held.pop_all())
                return response
        except KeyMisuse as misuse:
            refusal = misuse
            what = f"{request.method} {request.url.path}"
            sessions.note(misuse.sign, what, misuse.callers, _owner(request) or "")
        except Refusal as error:
            refusal = error
        except ClientDisconnect:
            return Response(status_code=499)  # nobody is there to read it
        except Exception:
            log.exception("%s %r failed", request.method, request.url.path)
            refusal = Refusal(Reason.INTERNAL, "the proxy failed; see its log")
        # This frame, which its traceback holds, and with it the body, would wait for the collector.
        refusal.__traceback__ = None
        sessions.num_rejected[refusal.reason] += 1
        if session is not None:
            session.num_rejected += 1
            session.last_call = refusal.reason
        return _refused(refusal, dialect)

    return call


def _owner(request: Request) -> str | None:
    """Whose connection it came by, where connections have an owner."""
    owner: str | None = request.scope.get("state", {}).get(STATE_KEY)
    return owner


def _note_route(sessions: Sessions, request: Request) -> None:
    path, owner = request.url.path, _owner(request)
    caller = sessions.caller(owner, [*_PATH_KEY.findall(path)[:1], *given_keys(request)])
    callers = [caller] if caller is not None else []
    sessions.note(sign_of_route(path), f"{request.method} {path}", callers, owner or "")


def _has_short_query(request: Request) -> bool:
    query: bytes = request.scope["query_string"]
    return query.count(b"&") < MAX_PARAMETERS


def given_keys(request: Request) -> list[str]:
    """At most `MAX_KEYS` of those that a call brings, each once."""
    keys = []
    for name, value in request.scope["headers"]:
        if name == b"authorization":
            scheme, _, key = value.decode("latin-1").partition(" ")
            if scheme.lower() == "bearer":
                keys.append(key.strip())
        elif name in (b"x-api-key", b"x-goog-api-key"):
            keys.append(value.decode("latin-1").strip())
    if request.scope["query_string"] and _has_short_query(request):
        keys += request.query_params.getlist("key")
    return [*dict.fromkeys(keys)][:MAX_KEYS]


async def read_body(request: Request, take: Callable[[int], None]) -> bytes:
    """The whole body. Raises `Refusal` where it is too large or too slow, and what `take` raises,
    which is told of each part; `ClientDisconnect`."""
    encoding = header(request, b"content-encoding")
    if encoding not in (b"", b"identity"):
        raise invalid(f"The body is encoded ({encoding[:40].decode('latin-1')}): send it as it is.")
    length = header(request, b"content-length")
    if length.isdigit() and int(length) > MAX_BODY_BYTES:
        raise _too_large()
    if has_arrived(request):
        return await _read_parts(request, take)
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await _read_parts(request, take)
    except TimeoutError:
        raise Refusal(
            Reason.INVALID_REQUEST, f"The request did not arrive within {BODY_TIMEOUT_S} s."
        ) from None


async def _read_parts(request: Request, take: Callable[[int], None]) -> bytes:
    parts: list[bytes] = []
    num_bytes, is_more = 0, True
    while is_more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part = message["body"]
        num_bytes += len(part)
        if num_bytes > MAX_BODY_BYTES:
            raise _too_large()
        take(len(part))
        parts.append(part)
        is_more = message["more_body"]
    return b"".join(parts)


def _too_large() -> Refusal:
    return Refusal(Reason.TOO_LARGE, f"The request is larger than {MAX_BODY_BYTES} bytes.")


def _refused(refusal: Refusal, dialect: Dialect) -> Response:
    headers = request_headers(dialect)
    if refusal.reason is not Reason.TOO_MANY_CALLS:
        # The causes do not go away by asking again; SDKs heed this header.
        headers["x-should-retry"] = "false"
    status = dialect.error_status(refusal)
    return Response(dialect.error_body(refusal), status, headers, media_type=JSON)
