"""One sampling request on the fleet: its tokens as they come, and its life over a server's death.

A request whose server dies goes on elsewhere (or on the same one, once it is back) with its prompt
and all tokens it has, so what was given to the caller stays true; how often is bounded.

Versions: with adapters, a request is sampled by the one that it began with, to its end. Otherwise:
while a request streams, a token has the version that its server was at when it arrived,
which is changed while the server is paused and idle; at its end the engine's own spans, where it
gives them, replace those not yet given away, and are compared with the others.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field, replace

from areal_sub.engines.embedded.grammars import TOO_MUCH
from areal_sub.engines.embedded.request import Request, RequestError
from areal_sub.engines.vllm.api import Refused, ServerGone
from areal_sub.engines.vllm.fleet import Fleet
from areal_sub.engines.vllm.member import Member
from areal_sub.engines.vllm.wire import Piece, ReplyError, Way, body_of, piece_of, versions_of
from areal_sub.records import GenerateChunk, extend_digest, float32, int32, uint32

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Sampled:
    """All that one request has so far; the first `num_given` tokens are with the caller."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)
    num_given: int = 0
    digest: int = 0  # of what the engine read and sampled
    finish_reason: str | None = None

    def take(self, piece: Piece, version: int, num_before: int) -> None:
        """Add `piece`, of an attempt that began with `num_before` tokens. Raises `ReplyError`."""
        if piece.prompt_token_ids is not None:
            self.digest = extend_digest(0, int32(piece.prompt_token_ids))
        for token_id in piece.token_ids:
            self.digest = extend_digest(self.digest, int32([token_id]))
            self.digests.append(self.digest)
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        self.versions += [version] * len(piece.token_ids)
        if piece.versions is not None:
            told = versions_of(piece.versions, len(self.token_ids) - num_before)
            given = self.versions[num_before : self.num_given]
            if (num_wrong := sum(a != b for a, b in zip(given, told, strict=False))) > 0:
                log.warning("%d tokens were given with a version next to theirs", num_wrong)
            self.versions[num_before:] = told
        self.finish_reason = piece.finish_reason

    def chunk(self) -> GenerateChunk:
        """What the caller has not got yet."""
        new = slice(self.num_given, None)
        self.num_given = len(self.token_ids)
        return GenerateChunk(
            token_ids=int32(self.token_ids[new]),
            logprobs=float32(self.logprobs[new]),
            versions=int32(self.versions[new]),
            finish_reason=self.finish_reason,
            digests=uint32(self.digests[new]),
        )


class Calls:
    def __init__(self, fleet: Fleet, *, max_retries: int) -> None:
        self._fleet = fleet
        self._max_retries = max_retries
        self.num_running = 0
        self.num_generated_tokens = 0
        self.num_retried = 0

    async def run(self, request: Request) -> AsyncGenerator[GenerateChunk, None]:
        """Chunks until one has a finish reason. Raises `RequestError`."""
        sampled = Sampled()
        self.num_running += 1
        try:
            num_failures = 0
            while sampled.finish_reason is None:
                member = await self._fleet.pick(request.affinity)
                try:
                    async for _ in self._attempt(member, request, sampled):
                        if request.stream or sampled.finish_reason is not None:
                            yield sampled.chunk()
                except ServerGone as error:
                    num_failures += 1
                    self.num_retried += 1
                    if num_failures > self._max_retries:
                        raise RequestError(
                            f"its server went away {num_failures} times: {error}"
                        ) from None
                    log.warning("going on after %d tokens: %s", len(sampled.token_ids), error)
                    await self._fleet.look_at(member)
        finally:
            self.num_running -= 1
            self.num_generated_tokens += len(sampled.token_ids)

    async def _attempt(
        self, member: Member, request: Request, sampled: Sampled
    ) -> AsyncIterator[None]:
        """Go on with `sampled` on one server, stopping after each piece."""
        num_before = len(sampled.token_ids)
        way = member.can.way
        # Without spans only the time of arrival tells versions apart, so tokens have to arrive.
        # Of what is held to a grammar, too: the server gives it up where that takes too much.
        stream = request.stream or way is Way.COMPLETIONS or request.grammar != ""
        began_with, fixed = member.version, member.takes_adapters
        body = body_of(
            way,
            request,
            sampled.token_ids,
            salt=f"v{began_with}",  # keys and values of other weights are of no use
            stream=stream,
            model=member.model,
        )

        member.num_running += 1
        member.num_using[began_with] += 1
        try:
            if stream:
                async for data in member.api.stream(way.value, body):
                    version = began_with if fixed else member.version
                    if _take(sampled, way, data, version, num_before, spans=not fixed):
                        yield
            else:
                data = await member.api.ask(way.value, body)
                version = began_with if fixed else -1  # the spans tell
                if _take(sampled, way, data, version, num_before, spans=not fixed):
                    yield
        except Refused as error:
            if error.status >= 500:
                raise ServerGone(str(error)) from None
            raise RequestError(str(error)) from None
        except ReplyError as error:
            if not await member.is_healthy():  # its engine has died, and it can still say so
                raise ServerGone(str(error)) from None
            held = f"; it was held to a grammar: perhaps {TOO_MUCH}" if request.grammar else ""
            raise RequestError(f"{error}{held}") from None
        finally:
            member.num_running -= 1
            member.num_using[began_with] -= 1
        if sampled.finish_reason is None:
            raise ServerGone(f"{member.api} gave up a request")


def _take(
    sampled: Sampled, way: Way, data: object, version: int, num_before: int, *, spans: bool
) -> bool:
    """`spans`: those that the engine gives are of what was sampled with, and not of its base."""
    piece = piece_of(way, data, len(sampled.token_ids) - num_before)
    if piece is None:
        return False
    sampled.take(piece if spans else replace(piece, versions=None), version, num_before)
    if sampled.finish_reason in ("abort", "error"):  # not ours: go on elsewhere
        sampled.finish_reason = None
    return True
