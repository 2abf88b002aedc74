"""One choice of a call while it is sampled: engine chunks in, deltas for the agent out.

A state machine without effects. It keeps what the record needs (tokens, logprobs, versions, exactly
as sampled) apart from what the agent gets (text with stop strings cut and calls parsed).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import replace

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
from areal_sub.proxy.parsers import AnswerParser, ParsedCall, Piece
from areal_sub.proxy.vocabulary import Vocabulary
from areal_sub.records import GenerateChunk


def may_end_early(call: Call) -> bool:
    """Whether the text that was sampled may end the sampling."""
    return bool(call.stop) or (call.parses_tool_calls and not call.parallel_tool_calls)


class Sampled:
    """What was sampled of one choice so far."""

    def __init__(
        self,
        call: Call,
        vocabulary: Vocabulary,
        hidden: frozenset[int],
        parser: AnswerParser,
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
        self._token_by_token = may_end_early(call)
        self._parser = parser
        self._one_call = not call.parallel_tool_calls
        self._is_cut = False  # by what came after the one call that was asked for
        self._wants_logprobs = call.logprobs

    def take(self, chunk: GenerateChunk) -> Delta:
        """Add `chunk`; returns what the agent may see of it by now. Not after `finish_reason`.

        Tokens behind the one that completed a stop string, or that began something after the only
        call that was wanted, are dropped: they were never asked for.
        """
        ids, logprobs = chunk.token_ids.tolist(), chunk.logprobs.tolist()
        versions = chunk.versions.tolist()
        digests = chunk.digests.tolist()
        # Where the text may end it, each token is looked at alone, to know which one did.
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
            if self._has_ended():
                break
        if self._has_ended() or chunk.finish_reason is not None:
            self._finish("length" if chunk.finish_reason == "length" else "stop", delta)
        self._answer.add(delta)
        return delta

    def answer(self) -> Message:
        """What the agent will say was sampled, when it goes on from here."""
        return self._answer.message()

    def answer_with_stop(self) -> Message | None:
        """The answer with the stop string that ended it, which was sampled and cut: agents that
        live by marks (a closing tag) put it back. None: none did, or a call stands behind it."""
        if self._stops.found is None or self._answer.tool_calls:
            return None
        answer = self.answer()
        return replace(answer, content=answer.content + self._stops.found)

    def _has_ended(self) -> bool:
        return self._is_cut or self._stops.found is not None

    def _has_the_one_call(self, delta: Delta) -> bool:
        return self._one_call and bool(self._answer.tool_calls or delta.tool_calls)

    def _feed(self, text: str, delta: Delta) -> None:
        self._parse(self._stops.feed(text), delta)

    def _parse(self, text: str, delta: Delta) -> None:
        if self._has_the_one_call(delta):
            self._is_cut = self._is_cut or bool(text.strip())
        elif text:
            self._add(self._parser.feed(text), delta)

    def _finish(self, reason: FinishReason, delta: Delta) -> None:
        if not self._has_ended():
            self._feed(self._decoder.finish(), delta)
        if self._has_ended():
            reason = "stop"
        self._parse(self._stops.finish(), delta)
        self._add(self._parser.finish(), delta)
        if reason == "stop" and (self._answer.tool_calls or delta.tool_calls):
            reason = "tool_calls"
        self.finish_reason = delta.finish_reason = reason
        delta.stop_sequence = self._stops.found

    def _add(self, pieces: Iterable[Piece], delta: Delta) -> None:
        for piece in pieces:
            if self._has_the_one_call(delta):
                self._is_cut = True
                return
            if isinstance(piece, ParsedCall):
                taken = {call.id for call in (*self._answer.tool_calls, *delta.tool_calls)}
                is_new = piece.id and piece.id not in taken
                call_id = piece.id if is_new else f"call_{secrets.token_hex(12)}"
                delta.append(ToolCall(call_id, piece.name, piece.arguments))
            else:
                delta.append(piece)

    def _logprobs(self, ids: list[int], logprobs: list[float]) -> list[TokenLogprob]:
        out = []
        for token_id, logprob in zip(ids, logprobs, strict=True):
            text = self._vocabulary.decode([token_id])
            out.append(TokenLogprob(text, logprob, text.encode()))
        return out
