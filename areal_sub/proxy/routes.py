"""The paths of the agent plane, and which dialect each speaks (`docs/dialects.md` has the table).

Each path is there with and without its version (`/v1`, Gemini's also `/v1beta`), OpenAI's also
where Azure and Google have them, and each below `/k/{key}` for agents that hard-code an API key.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from areal_sub.proxy.answering import answer_call
from areal_sub.proxy.dialects import (
    JSON,
    Asked,
    Dialect,
    chat,
    completions,
    gemini,
    messages,
    responses,
)
from areal_sub.proxy.refusals import Reason, Refusal, invalid
from areal_sub.proxy.sessions import Session
from areal_sub.proxy.turns import Turns

KEYED = "/k/{key}"
BASES = ("/v1", "", KEYED + "/v1", KEYED)
BETA_BASES = ("/v1beta", KEYED + "/v1beta")
_ELSEWHERE = (
    "/v1beta/openai",  # OpenAI's APIs at Google
    "/openai/v1",  # at Azure, its new way and its old one
    "/openai/deployments/{deployment}",
    "/openai",
)
ELSEWHERE_BASES = tuple(key + base for base in _ELSEWHERE for key in ("", KEYED))
_KEY = r"(/k/[^/]*)?"

Endpoint = Callable[[Request, Session, Asked], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Route:
    method: str
    path: str
    dialect: Dialect
    endpoint: Endpoint


def dialect_of(path: str) -> Dialect:
    """Whose error body a request for `path`, which no route takes, is answered with."""
    if re.match(_KEY + r"(/v1)?/messages\b", path):
        return messages
    return gemini if re.match(_KEY + r"(/v1beta\b|(/v1)?/models/.*:)", path) else chat


def make_routes(turns: Turns) -> list[Route]:
    """All of them, the busiest first."""
    return [
        *(_with_base(base, route) for base in BASES for route in _routes(turns)),
        *(_with_base(base, route) for base in BETA_BASES for route in _gemini_routes(turns)),
        *(_with_base(base, route) for base in ELSEWHERE_BASES for route in _routes(turns)),
    ]


def _with_base(base: str, route: Route) -> Route:
    return replace(route, path=base + route.path)


def _routes(turns: Turns) -> list[Route]:
    def asking(path: str, dialect: Dialect) -> Route:
        async def endpoint(request: Request, session: Session, asked: Asked) -> Response:
            return await answer_call(request, turns, session, dialect, dialect.parse(asked))

        return Route("POST", path, dialect, endpoint)

    async def count_tokens(request: Request, session: Session, asked: Asked) -> Response:
        return _json(messages.counted(await turns.count(session, messages.parse(asked))))

    async def input_tokens(request: Request, session: Session, asked: Asked) -> Response:
        return _json(responses.counted(await turns.count(session, responses.parse(asked))))

    generate, *_ = _gemini_routes(turns)
    return [
        asking("/chat/completions", chat),
        asking("/responses", responses),
        asking("/messages", messages),
        Route("POST", "/messages/count_tokens", messages, count_tokens),
        generate,
        asking("/completions", completions),
        Route("POST", "/embeddings", chat, no_embeddings),
        Route("GET", "/models", chat, models),
        Route("GET", "/models/{name:path}", chat, model),
        Route("POST", "/responses/input_tokens", responses, input_tokens),
        Route("GET", "/responses", responses, no_websocket),
        Route("GET", "/responses/{name}", responses, kept_response),
        Route("DELETE", "/responses/{name}", responses, forget_response),
    ]


def _gemini_routes(turns: Turns) -> list[Route]:
    async def generate(request: Request, session: Session, asked: Asked) -> Response:
        method = asked.path["target"].rpartition(":")[2]
        if method in gemini.METHODS:
            return await answer_call(request, turns, session, gemini, gemini.parse(asked))
        if method == gemini.COUNT_METHOD:
            return _json(gemini.counted(await turns.count(session, gemini.parse(asked))))
        if "embed" in method.lower():
            return await no_embeddings(request, session, asked)
        raise Refusal(Reason.UNKNOWN_ROUTE, f"there is no method {method[:100]!r} of models here")

    return [
        Route("POST", "/models/{target:path}", gemini, generate),
        Route("GET", "/models", gemini, models),
        Route("GET", "/models/{name:path}", gemini, model),
    ]


async def no_websocket(request: Request, session: Session, asked: Asked) -> Response:
    what = f"{request.method} {request.url.path}"
    if "upgrade" in request.headers:
        raise Refusal(Reason.UPGRADE_REQUIRED, f"{what}: no WebSockets here; use POST and events.")
    raise Refusal(Reason.WRONG_METHOD, f"Not allowed: {what}")


async def kept_response(request: Request, session: Session, asked: Asked) -> Response:
    return Response(responses.kept_answer(asked), media_type=JSON)


async def forget_response(request: Request, session: Session, asked: Asked) -> Response:
    if not session.kept.remove(asked.path["name"]):
        raise responses.unknown(asked)
    return _json({"id": asked.path["name"], "object": "response", "deleted": True})


async def no_embeddings(request: Request, session: Session, asked: Asked) -> Response:
    raise invalid(
        "The policy has no embeddings. Point the agent's embedding model at another endpoint, or "
        "compute them in the agent."
    )


async def models(request: Request, session: Session, asked: Asked) -> Response:
    ends = {"has_more": False, "first_id": "policy", "last_id": "policy"}
    listed = [_model("policy")]
    return _json({"object": "list", "data": listed, "models": listed, **ends})


async def model(request: Request, session: Session, asked: Asked) -> Response:
    return _json(_model(asked.path["name"]))


def _model(name: str) -> dict[str, Any]:
    """For the SDKs of OpenAI, Anthropic and Google at once, as they ask at the same path."""
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "areal-sub",
        "type": "model",
        "display_name": name,
        "created_at": "1970-01-01T00:00:00Z",
        "name": f"models/{name}",
        "displayName": name,
        "supportedGenerationMethods": [*gemini.METHODS, gemini.COUNT_METHOD],
    }


def _json(body: Any) -> Response:
    return Response(orjson.dumps(body), media_type=JSON)
