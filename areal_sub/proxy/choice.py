"""One choice of a call while it is sampled: engine chunks in, deltas for the agent out.

A state machine without effects. It keeps what the record needs (tokens, logprobs, versions, exactly
as sampled) apart from what the agent gets (text with stop strings cut and calls parsed).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from areal_sub.proxy.decode import StopStrings, TextDecoder
from areal_sub.proxy.neutral import (
    Call,
    Choice,
    Delta,
    FinishReason,
    Message,
    TokenLogprob,
    ToolCall,
)
from areal_sub.proxy.parsers import ParsedCall, Piece, ToolCallParser
from areal_sub.proxy.vocabulary import Vocabulary
from areal_sub.records import GenerateChunk


class Sampled:
    """What was sampled of one choice so far."""

    def __init__(
        self, call: Call, vocabulary: Vocabulary, hidden: frozenset[int], parser: ToolCallParser
    ) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []
        self.engine_digest = 0  # the engine's, at the last token kept
        self.finish_reason: FinishReason | None = None
        self._answer = Choice()
        self._vocabulary = vocabulary
        self._decoder = TextDecoder(vocabulary.decode, hidden)
        self._stops = StopStrings(call.stop)
        self._token_by_token = bool(call.stop)
        self._parser = parser if call.parse_tool_calls else None
        self._wants_logprobs = call.logprobs

    def take(self, chunk: GenerateChunk) -> Delta:
        """Add `chunk`; returns what the agent may see of it by now. Not after `finish_reason`.

        Tokens behind the one that completed a stop string are dropped: they were never asked for.
        """
        ids, logprobs = chunk.token_ids.tolist(), chunk.logprobs.tolist()
        versions = chunk.versions.tolist()
        digests = chunk.digests.tolist()
        # With stop strings each token is looked at alone, to know which one completed it.
        step = 1 if self._token_by_token else max(1, len(ids))
        delta = Delta()
        for start in range(0, len(ids), step):
            part = slice(start, start + step)
            self.token_ids += ids[part]
            self.logprobs += logprobs[part]
            self.versions += versions[part]
            if digests[part]:
                self.engine_digest = digests[part][-1]
            if self._wants_logprobs:
                delta.logprobs += self._logprobs(ids[part], logprobs[part])
            self._feed(self._decoder.feed(ids[part]), delta)
            if self._stops.found:
                break
        if self._stops.found or chunk.finish_reason is not None:
            self._finish("length" if chunk.finish_reason == "length" else "stop", delta)
        self._answer.add(delta)
        return delta

    def answer(self) -> Message:
        """What the agent will say was sampled, when it goes on from here."""
        return Message("assistant", self._answer.text, tuple(self._answer.tool_calls))

    def _feed(self, text: str, delta: Delta) -> None:
        text = self._stops.feed(text)
        if self._parser is None:
            delta.text += text
        elif text:
            self._add(self._parser.feed(text), delta)

    def _finish(self, reason: FinishReason, delta: Delta) -> None:
        if not self._stops.found:
            self._feed(self._decoder.finish(), delta)
        rest = self._stops.finish()
        if self._parser is None:
            delta.text += rest
        else:
            self._add(self._parser.feed(rest) if rest else (), delta)
            self._add(self._parser.finish(), delta)
        if self._stops.found:
            reason = "stop"
        if reason == "stop" and (self._answer.tool_calls or delta.tool_calls):
            reason = "tool_calls"
        self.finish_reason = delta.finish_reason = reason

    def _add(self, pieces: Iterable[Piece], delta: Delta) -> None:
        for piece in pieces:
            if isinstance(piece, ParsedCall):
                call_id = f"call_{secrets.token_hex(12)}"
                delta.tool_calls.append(ToolCall(call_id, piece.name, piece.arguments))
            else:
                delta.text += piece

    def _logprobs(self, ids: list[int], logprobs: list[float]) -> list[TokenLogprob]:
        out = []
        for token_id, logprob in zip(ids, logprobs, strict=True):
            text = self._vocabulary.decode([token_id])
            out.append(TokenLogprob(text, logprob, text.encode()))
        return out
