"""The paths of the agent plane, and which dialect each speaks (`docs/dialects.md` has the table).

Each path is there with and without `/v1`, and each below `/k/{key}` for agents that hard-code an
API key.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from areal_sub.proxy.answering import answer_call
from areal_sub.proxy.dialects import JSON, Asked, Dialect, chat
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
    return chat


def make_routes(turns: Turns) -> list[Route]:
    def asking(path: str, dialect: Dialect) -> Route:
        async def endpoint(request: Request, session: Session, asked: Asked) -> Response:
            return await answer_call(request, turns, session, dialect, dialect.parse(asked))

        return Route("POST", path, dialect, endpoint)

    return [
        asking("/chat/completions", chat),
        Route("GET", "/models", chat, models),
        Route("GET", "/models/{name:path}", chat, model),
    ]


async def models(request: Request, session: Session, asked: Asked) -> Response:
    return _json({"object": "list", "data": [_model("policy")]})


async def model(request: Request, session: Session, asked: Asked) -> Response:
    return _json(_model(asked.path["name"]))


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "areal-sub"}


def _json(body: Any) -> Response:
    return Response(orjson.dumps(body), media_type=JSON)
