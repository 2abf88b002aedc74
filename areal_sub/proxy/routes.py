"""The paths of the agent plane, and which dialect each speaks (`docs/dialects.md` has the table).

Each path is there with and without `/v1`, and each below `/k/{key}` for agents that hard-code an
API key.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from areal_sub.proxy.answering import answer_call
from areal_sub.proxy.dialects import JSON, Asked, Dialect, chat, completions, messages, responses
from areal_sub.proxy.refusals import Reason, Refusal, invalid
from areal_sub.proxy.sessions import Session
from areal_sub.proxy.turns import Turns

BASES = ("", "/v1", "/k/{key}", "/k/{key}/v1")

Endpoint = Callable[[Request, Session, Asked], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Route:
    method: str
    path: str
    dialect: Dialect
    endpoint: Endpoint


def dialect_of(path: str) -> Dialect:
    """Whose error body a request for `path`, which no route takes, is answered with."""
    return messages if re.match(r"(/k/[^/]*)?(/v1)?/messages\b", path) else chat


def make_routes(turns: Turns) -> list[Route]:
    def asking(path: str, dialect: Dialect) -> Route:
        async def endpoint(request: Request, session: Session, asked: Asked) -> Response:
            return await answer_call(request, turns, session, dialect, dialect.parse(asked))

        return Route("POST", path, dialect, endpoint)

    async def count_tokens(request: Request, session: Session, asked: Asked) -> Response:
        return _json(messages.counted(await turns.count(session, messages.parse(asked))))

    return [
        asking("/chat/completions", chat),
        asking("/responses", responses),
        asking("/messages", messages),
        Route("POST", "/messages/count_tokens", messages, count_tokens),
        Route("GET", "/responses", responses, no_websocket),
        Route("GET", "/responses/{name}", responses, kept_response),
        Route("DELETE", "/responses/{name}", responses, forget_response),
        asking("/completions", completions),
        Route("POST", "/embeddings", chat, no_embeddings),
        Route("GET", "/models", chat, models),
        Route("GET", "/models/{name:path}", chat, model),
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
    return _json({"object": "list", "data": [_model("policy")], **ends})


async def model(request: Request, session: Session, asked: Asked) -> Response:
    return _json(_model(asked.path["name"]))


def _model(name: str) -> dict[str, Any]:
    """For OpenAI's SDKs and for Anthropic's, which ask at the same path."""
    ours = {"id": name, "object": "model", "created": 0, "owned_by": "areal-sub"}
    return {**ours, "type": "model", "display_name": name, "created_at": "1970-01-01T00:00:00Z"}


def _json(body: Any) -> Response:
    return Response(orjson.dumps(body), media_type=JSON)
