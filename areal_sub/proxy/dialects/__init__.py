"""API dialects: each a thin translation between its wire form and `neutral.py`.

A dialect is a module that has what `Dialect` says. `routes.py` gives it its paths; the modules know
nothing of HTTP, sessions or tokens. Fields that they do not know are ignored, explicit null is the
same as nothing, and a field that asks for what cannot be done is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from areal_sub.proxy.kept import KeptAnswers
from areal_sub.proxy.neutral import Call, Choice, Delta, Usage
from areal_sub.proxy.refusals import Refusal
from areal_sub.proxy.seen import Seen

JSON = "application/json"
EVENTS = "text/event-stream"


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, as far as dialects see it."""

    raw: bytes
    path: Mapping[str, str] = field(default_factory=dict)  # what the route's path names
    query: Mapping[str, str] = field(default_factory=dict)
    kept: KeptAnswers = field(default_factory=KeptAnswers)  # this rollout's
    seen: Seen = field(default_factory=Seen)  # this rollout's


class Stream(Protocol):
    """One streamed answer. `events` for each delta, then `end` or `failure`, once."""

    media_type: str

    def events(self, index: int, delta: Delta) -> Iterable[bytes]: ...

    def end(self, usage: Usage) -> bytes: ...

    def failure(self, refusal: Refusal) -> bytes:
        """The answer has begun, so the refusal can only be an event; SDKs raise it."""
        ...


class Dialect(Protocol):
    NAME: str  # in records
    ID_PREFIX: str  # of answers' ids
    REQUEST_ID: str  # the header in which SDKs look for the request's id

    def parse(self, asked: Asked) -> Call:
        """Raises `Refusal` naming the field."""
        ...

    def answer(
        self, answer_id: str, call: Call, choices: Sequence[Choice], usage: Usage
    ) -> bytes: ...

    def stream(self, answer_id: str, call: Call, num_prompt_tokens: int) -> Stream: ...

    def error_status(self, refusal: Refusal) -> int: ...

    def error_body(self, refusal: Refusal) -> bytes: ...
