"""Error bodies of OpenAI's, for all of its APIs."""

from __future__ import annotations

from typing import Any

import orjson

from areal_sub.proxy.refusals import Reason, Refusal

_CODES = {
    Reason.UNKNOWN_KEY: "invalid_api_key",
    Reason.FINISHED_KEY: "invalid_api_key",
    Reason.FOREIGN_KEY: "invalid_api_key",
    Reason.TOO_LARGE: "request_too_large",
    Reason.CONTEXT_LENGTH: "context_length_exceeded",
    Reason.TURN_LIMIT: "rollout_turn_limit",
    Reason.WRONG_METHOD: "method_not_supported",
    Reason.UPGRADE_REQUIRED: "websocket_not_supported",
    Reason.ENGINE_GONE: "engine_unavailable",
    Reason.ENGINE_FAILED: "engine_failed",
    Reason.DEADLINE: "deadline_exceeded",
}


def error(refusal: Refusal) -> dict[str, Any]:
    return {
        "message": str(refusal),
        "type": "server_error" if refusal.status >= 500 else "invalid_request_error",
        "param": refusal.param,
        "code": _CODES.get(refusal.reason),
    }


def error_body(refusal: Refusal) -> bytes:
    return orjson.dumps({"error": error(refusal)})


def error_status(refusal: Refusal) -> int:
    return refusal.status
