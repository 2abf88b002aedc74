"""Why a call is refused: one exception, which each dialect turns into its own error body.

Raised anywhere below the routes; caught in `app.py`, which counts it under its `reason`.
"""

from __future__ import annotations

from enum import StrEnum

from areal_sub.errors import ArealSubError


class Reason(StrEnum):
    """What refused calls are counted under."""

    UNKNOWN_KEY = "unknown_key"  # no rollout ever had it, or none was given
    FINISHED_KEY = "finished_key"  # its rollout has ended
    FOREIGN_KEY = "foreign_key"  # keys of two rollouts in one call
    INVALID_REQUEST = "invalid_request"
    TOO_LARGE = "too_large"
    CONTEXT_LENGTH = "context_length_exceeded"
    TURN_LIMIT = "rollout_turn_limit"
    TOO_MANY_CALLS = "too_many_calls"  # at once
    UNKNOWN_ROUTE = "unknown_route"
    UNKNOWN_ANSWER = "unknown_answer"  # an earlier answer that is not kept
    UPGRADE_REQUIRED = "upgrade_required"
    WRONG_METHOD = "wrong_method"
    ENGINE_GONE = "engine_gone"
    ENGINE_FAILED = "engine_failed"
    DEADLINE = "deadline"
    INTERNAL = "internal"


# None of these is a status that SDKs retry for a cause that a retry cannot change.
STATUS = {
    Reason.UNKNOWN_KEY: 401,
    Reason.FINISHED_KEY: 401,
    Reason.FOREIGN_KEY: 401,
    Reason.INVALID_REQUEST: 400,
    Reason.TOO_LARGE: 413,
    Reason.CONTEXT_LENGTH: 400,
    Reason.TURN_LIMIT: 400,
    Reason.TOO_MANY_CALLS: 429,  # later there is room
    Reason.UNKNOWN_ROUTE: 404,
    Reason.UNKNOWN_ANSWER: 404,
    Reason.UPGRADE_REQUIRED: 426,
    Reason.WRONG_METHOD: 405,
    Reason.ENGINE_GONE: 503,
    Reason.ENGINE_FAILED: 502,
    Reason.DEADLINE: 504,
    Reason.INTERNAL: 500,
}


MAX_MESSAGE_CHARS = 2000
"""Many quote what the agent sent, which may be as long as a body."""


class Refusal(ArealSubError):
    """A call is not answered with a completion. `param` is the offending field's path, if any."""

    def __init__(self, reason: Reason, message: str, *, param: str | None = None) -> None:
        super().__init__(message[:MAX_MESSAGE_CHARS])
        self.reason = reason
        self.status = STATUS[reason]
        self.param = param


class ContextTooLong(Refusal):
    """The dialects word this one themselves: SDKs and agents look for the wording."""

    def __init__(self, num_tokens: int, max_model_len: int) -> None:
        """`num_tokens`: of the prompt and one new token, or fewer."""
        super().__init__(
            Reason.CONTEXT_LENGTH,
            f"This model's maximum context length is {max_model_len} tokens. However, "
            f"your messages and at least one new token need {num_tokens} tokens or more. "
            "Please reduce the length of the messages.",
            param="messages",
        )
        self.num_tokens = num_tokens
        self.max_model_len = max_model_len


def invalid(message: str, param: str | None = None) -> Refusal:
    """The request itself is wrong: 400, naming the field."""
    return Refusal(Reason.INVALID_REQUEST, message, param=param)
