"""A model call from its messages to its records: match, render, sample, record.

Owns `Turns`. Invariants: a choice's turn is recorded before the agent can have seen its end, so a
turn's parent is always recorded before it; whatever was sampled is recorded, also where the agent
hung up or the rollout ended (`finish_reason` "aborted"), unless not one token arrived; what is
asked of the engine is recorded before it (`IntentRecord`). A reader
that does not read delays nobody: sampling runs on, and what it gives is merged until it is fetched.

Called by `answering.py`: one `prepare` per call, then one `run` or `answer`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from areal_sub.engine_client import EngineClient
from areal_sub.errors import GrammarError, PeerGone, RpcError
from areal_sub.proxy.choice import Sampled, may_end_early
from areal_sub.proxy.constraints import Reasoning, grammar_of, refused
from areal_sub.proxy.families.traits import traits_of
from areal_sub.proxy.history import Keys, Match, Prompt
from areal_sub.proxy.neutral import Call, Delta, Message
from areal_sub.proxy.parsers import AnswerParser, TwoPartParser
from areal_sub.proxy.refusals import ContextTooLong, Reason, Refusal, invalid
from areal_sub.proxy.render import Renderer, TextTooLong
from areal_sub.proxy.sessions import Sampling, Session, finished
from areal_sub.proxy.template import RenderError
from areal_sub.records import (
    Fork,
    GenerateRequest,
    Int32Array,
    IntentRecord,
    TurnRecord,
    float32,
    int32,
)
from areal_sub.trajectory.journal import Journal
from areal_sub.waits import waiting

log = logging.getLogger(__name__)

# Calls that were larger than this on the wire are rendered off the event loop.
LARGE_BYTES = 32_768
# Processes of the engine that one call is tried on: it may be what they die of.
MAX_ENGINES = 3
# Enough to hold a tag, or a header, that ends a prompt, where it is no token of its own.
NUM_END_TOKENS = 16
# Of an agent's own: below, it is the likeliest token that comes. Engines take it for this one
# (vLLM), or divide by it until there is no number left.
MIN_TEMPERATURE = 0.01


@dataclass(slots=True, kw_only=True)
class Prepared:
    """A call that may be sampled."""

    session: Session
    call: Call
    prompt: Prompt
    request: GenerateRequest
    answer_id: str  # the completion's, response's or message's, as the agent sees it
    started_at: float  # Unix time, s
    num_sampled_tokens: int = 0  # of all choices that have ended


class Turns:
    def __init__(
        self,
        *,
        engine: EngineClient,
        renderer: Renderer,
        journal: Journal,
        max_model_len: int,
        request_timeout_s: float,
    ) -> None:
        self._engine = engine
        self._renderer = renderer
        self._journal = journal
        self._max_model_len = max_model_len
        renderer.max_chars = max_model_len * renderer.vocabulary.max_token_chars
        self._timeout_s = request_timeout_s
        self._hidden = renderer.vocabulary.hidden_ids(renderer.format.tags)
        traits = traits_of(renderer)
        # An answer with two calls could not be shown to the model again.
        self._one_call = traits.takes_calls and not traits.takes_parallel_calls
        if traits.takes_calls and not traits.reads_calls:
            log.warning(
                "the chat template does not write calls as %s does, which they are read as: they "
                "may stay text; name another format in rollout.openai.tool_call_parser",
                renderer.format.name,
            )
        if not traits.takes_tools:
            log.warning(
                "the chat template does not show tools to the model: what agents pass as tools it "
                "never sees; name a template that does in rollout.openai.chat_template"
            )
        self._stop_ids = sorted(renderer.vocabulary.stop_ids)
        self.forks: Counter[str] = Counter()  # of recorded turns, by `Fork`
        self.num_requests = 0  # admitted calls
        self.num_turns = 0  # recorded
        self.num_aborted = 0
        self.num_prompt_tokens = 0
        self.num_sampled_tokens = 0

    async def prepare(self, session: Session, call: Call, answer_id: str) -> Prepared:
        """Count the call, find what it continues, and make its prompt. Raises `Refusal`."""
        session.check_open()
        if self._one_call and call.parallel_tool_calls:
            call = replace(call, parallel_tool_calls=False)
        session.admit(call.num_choices)
        started_at = time.time()
        try:
            prompt, remember = await self._prompt(session, call)
            prompt_token_ids = prompt.token_ids()
            grammar = await self._grammar(session, call, prompt_token_ids)
            session.check_open()
            # Not before: what is refused counts against no limit, so nothing may stay of it.
            prompt = remember()
            if session.transcript is not None:
                session.transcript.ask(prompt, self._asked(call, prompt_token_ids))
        except Refusal:
            session.num_admitted -= call.num_choices
            raise
        temperature, top_p, top_k = sampling_of(call, session.sampling)
        room = self._max_model_len - prompt.num_tokens
        asked = call.max_new_tokens or room
        request = GenerateRequest(
            prompt_token_ids=prompt_token_ids,
            max_new_tokens=min(asked, session.sampling.max_new_tokens, room),
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop_token_ids=self._stop_ids,
            stream=call.stream or may_end_early(call),
            affinity=session.rollout_id,
            grammar=grammar,
        )
        return Prepared(
            session=session,
            call=call,
            prompt=prompt,
            request=request,
            answer_id=answer_id,
            started_at=started_at,
        )

    async def count(self, session: Session, call: Call) -> int:
        """How many tokens the call's prompt would have. Nothing is recorded. Raises `Refusal`."""
        session.check_open()
        keys = session.history.keys(call.messages, call.tools, self._renderer.recent.sort)
        matched = session.history.match(call.messages, keys)
        return (await self._find(session, call, keys, matched)).num_tokens

    async def run(self, prepared: Prepared) -> AsyncIterator[tuple[int, Delta]]:
        """(choice index, delta) as they come, until every choice has a finish reason.

        Closing the iterator aborts what still runs in the engine. Raises `Refusal`.
        """
        session = prepared.session
        outbox = _Outbox()
        tasks = [
            asyncio.create_task(self._run_choice(prepared, i, turn_id, outbox))
            for i, turn_id in enumerate(self._begin(prepared))
        ]

        def on_done(task: asyncio.Task[None]) -> None:
            session.ended(task)
            if task.cancelled():  # by the rollout's end, perhaps before it began to run
                outbox.fail(finished())

        for task in tasks:
            session.running.add(task)
            task.add_done_callback(on_done)
        try:
            num_running = len(tasks)
            while num_running:
                for index, delta in await outbox.get():
                    yield index, delta
                    num_running -= delta.finish_reason is not None
        finally:
            running = [task for task in tasks if not task.done()]
            for task in running:
                task.cancel()
            if running:
                await asyncio.gather(*running, return_exceptions=True)

    async def answer(self, prepared: Prepared, add: Callable[[int, Delta], None]) -> None:
        """Have `add` told of all that `run` gives, for who needs the answer as a whole. Raises
        `Refusal`."""
        if prepared.call.num_choices > 1:
            async with aclosing(self.run(prepared)) as deltas:  # type: ignore[type-var]
                async for index, delta in deltas:
                    add(index, delta)
            return
        # Nobody reads meanwhile, so it needs no task of its own, which would cost as much as what
        # is recorded of it.
        session, task = prepared.session, asyncio.current_task()
        assert task is not None
        [turn_id] = self._begin(prepared)
        session.running.add(task)
        try:
            add(0, await self._choice(prepared, turn_id, partial(add, 0)))
        except asyncio.CancelledError:
            if session.is_open or task.uncancel() > 0:
                raise
            raise finished() from None
        finally:
            session.ended(task)

    def _begin(self, prepared: Prepared) -> list[str]:
        """The ids of its choices' turns. Raises `Refusal`."""
        prepared.session.check_open()
        self.num_requests += 1
        num, answer_id = prepared.call.num_choices, prepared.answer_id
        ids = [choice_turn_id(answer_id, index) for index in range(num)]
        prepared.session.choices[answer_id] = ids
        return ids

    async def _grammar(self, session: Session, call: Call, prompt: Int32Array) -> str:
        answer_format, reasoning = self._renderer.format, None
        if answer_format.thinking is not None:
            opened, closed = answer_format.thinking.OPEN, answer_format.thinking.CLOSE
            begun = self._end_of(prompt).rstrip().endswith(opened)
            reasoning = Reasoning(opened, closed, begun)
        given = (call, answer_format, self._renderer.vocabulary.control_ids, reasoning)
        is_held = call.output_format.kind != "text" or call.tool_choice.mode == "required"
        if is_held and call.num_bytes > LARGE_BYTES:
            async with session.rendering:
                return await asyncio.to_thread(grammar_of, *given)
        return grammar_of(*given)

    def _asked(self, call: Call, prompt: Int32Array) -> Sequence[Message]:
        if call.raw_prompt is None:
            return call.messages
        return [Message("user", self._renderer.vocabulary.decode(prompt.tolist()))]

    async def _prompt(self, session: Session, call: Call) -> tuple[Prompt, Callable[[], Prompt]]:
        """The call's prompt, and what remembers it: then it is the one of an earlier such call."""
        if call.raw_prompt is not None:
            ids = int32(await self._raw_ids(session, call))
            raw = session.history.raw_prompt(ids)
            return raw, partial(session.history.add_raw, raw)
        keys = session.history.keys(call.messages, call.tools, self._renderer.recent.sort)
        matched = session.history.match(call.messages, keys)
        prompt = await self._find(session, call, keys, matched)
        self._check_length(prompt.num_tokens + 1)
        add = session.history.add_prompt
        return prompt, partial(add, call.messages, keys, prompt, matched)

    async def _find(self, session: Session, call: Call, keys: Keys, matched: Match) -> Prompt:
        num_chars = sum(len(message.content) for message in call.messages)
        self._check_length(num_chars // self._renderer.vocabulary.max_token_chars)
        if matched.twin is not None:
            return matched.twin
        if call.num_bytes > LARGE_BYTES and not self._is_soon_built(call, keys, matched):
            async with session.rendering:
                return await asyncio.to_thread(self._build, call, keys, matched)
        return self._build(call, keys, matched)

    def _is_soon_built(self, call: Call, keys: Keys, matched: Match) -> bool:
        """Whether only what is new has to be rendered, and that is little."""
        if matched.parent is None or matched.bare is not None:
            return False
        new = call.messages[matched.num_history - 1 :]
        return sum(len(message.content) for message in new) <= LARGE_BYTES and (
            self._renderer.recent.is_known(
                call.messages, keys.sorts, matched.num_history, bool(call.tools)
            )
        )

    async def _raw_ids(self, session: Session, call: Call) -> Sequence[int]:
        vocabulary, raw = self._renderer.vocabulary, call.raw_prompt
        assert raw is not None
        if isinstance(raw, str):
            self._check_length(len(raw) // vocabulary.max_token_chars)
            ids: Sequence[int]
            if call.num_bytes > LARGE_BYTES:
                async with session.rendering:
                    ids = await asyncio.to_thread(vocabulary.encode, raw)
            else:
                ids = vocabulary.encode(raw)
        else:
            ids = raw
            unknown = next((i for i in ids if not 0 <= i < vocabulary.size), None)
            if unknown is not None:
                raise invalid(f"prompt: {unknown} is no token of the model.", "prompt")
        self._check_length(len(ids) + 1)
        return ids

    def _check_length(self, num_tokens: int) -> None:
        if num_tokens > self._max_model_len:
            raise ContextTooLong(num_tokens, self._max_model_len)

    def _build(self, call: Call, keys: Keys, matched: Match) -> Prompt:
        """The prompt on top of the matched turn, or from scratch. Raises `Refusal`."""
        parent, fork, context = matched.parent, matched.fork, None
        continues = matched.continues
        try:
            if matched.bare is not None:
                # The template may write what the agent left out; then nothing was dropped.
                whole = int32(self._renderer.prompt(call.messages, call.tools))
                if (num := matched.bare.num_at_start_of(whole)) is not None:
                    parent, fork, context = matched.bare, Fork.NONE, whole[num:].tolist()
                    continues = None
                elif parent is None:
                    context = whole.tolist()
            if context is None and parent is not None:
                last_id = int(parent.token_ids[-1]) if len(parent.token_ids) else None
                context = self._renderer.continuation(
                    call.messages, call.tools, matched.num_history, last_id, keys.sorts
                )
                if context is None:
                    parent, fork, continues = None, Fork.TEMPLATE_REWROTE, continues or parent
            if context is None:
                context = self._renderer.prompt(call.messages, call.tools)
        except RenderError as error:
            raise invalid(str(error), "messages") from None
        except TextTooLong as error:
            num_tokens = error.num_chars // self._renderer.vocabulary.max_token_chars
            raise ContextTooLong(num_tokens, self._max_model_len) from None
        num_before = parent.prompt.num_tokens + len(parent.token_ids) if parent else 0
        if num_before + len(context) == 0:
            raise invalid("the model's chat template renders these messages as nothing", "messages")
        return Prompt(
            parent=parent,
            fork=fork,
            context=int32(context),
            num_tokens=num_before + len(context),
            tools=keys.tools,
            chain=keys.chain[-1],
            exact=keys.exact[-1],
            bare=keys.bare[-1],
            system=keys.system,
            num_messages=len(keys.messages),
            continues=continues,
        )

    async def _run_choice(
        self, prepared: Prepared, index: int, turn_id: str, outbox: _Outbox
    ) -> None:
        try:
            last = await self._choice(prepared, turn_id, partial(outbox.put, index))
        except Refusal as refusal:
            outbox.fail(refusal)
        else:
            outbox.put(index, last)

    async def _choice(
        self, prepared: Prepared, turn_id: str, put: Callable[[Delta], None]
    ) -> Delta:
        """Sample one choice and record it; `put` each delta but the last, which is returned. Raises
        `Refusal`."""
        sampled = self._sampled(prepared)
        try:
            self._journal.append(
                IntentRecord(
                    rollout_id=prepared.session.rollout_id,
                    turn_id=turn_id,
                    num_prompt_tokens=prepared.prompt.num_tokens,
                    asked_at=time.time(),
                )
            )
            try:
                return await self._sample(prepared, sampled, put)
            finally:
                self._record(prepared, turn_id, sampled)
        except Refusal as refusal:
            prepared.session.last_call = refusal.reason
            raise
        except Exception:
            log.exception("rollout %s, turn %s", prepared.session.rollout_id, turn_id)
            raise Refusal(Reason.INTERNAL, "the proxy failed; see its log") from None

    def _sampled(self, prepared: Prepared) -> Sampled:
        call, vocabulary = prepared.call, self._renderer.vocabulary
        if call.raw_prompt is not None:
            parser: AnswerParser = TwoPartParser(None, None)
        else:
            tools = call.tools if call.parses_tool_calls else ()
            answer_format, prompt_end = self._renderer.format, ""
            if answer_format.begins_in_prompt:
                prompt_end = self._end_of(prepared.request.prompt_token_ids)
            parser = answer_format.parser(tools, prompt_end)
        return Sampled(call, vocabulary, self._hidden, parser)

    def _end_of(self, prompt: Int32Array) -> str:
        """The prompt's last text: some templates begin the answer themselves."""
        return self._renderer.vocabulary.decode(prompt[-NUM_END_TOKENS:].tolist())

    async def _sample(
        self, prepared: Prepared, sampled: Sampled, put: Callable[[Delta], None]
    ) -> Delta:
        """Feed `sampled` from the engine until it has a finish reason, and `put` each delta; the
        last one is returned. Raises `Refusal`.

        Where the engine's process goes, the next one goes on from the tokens that there are.
        """
        num_left = MAX_ENGINES
        try:
            with waiting("the engine: a turn", self._timeout_s, prepared.session.rollout_id):
                async with asyncio.timeout(self._timeout_s):
                    while num_left:
                        num_left -= 1
                        prepared.session.engine_went |= not self._engine.is_connected
                        request = rest_of(prepared.request, sampled.token_ids)
                        try:
                            async with aclosing(self._engine.generate(request)) as chunks:
                                async for chunk in chunks:
                                    delta = sampled.take(chunk)
                                    if sampled.finish_reason is not None:
                                        return delta
                                    put(delta)
                            break
                        except PeerGone:
                            prepared.session.engine_went = True
                            # A grammar's state went with the engine; it cannot go on in the middle.
                            if not num_left or (request.grammar and sampled.token_ids):
                                raise
        except TimeoutError:
            raise Refusal(
                Reason.DEADLINE, f"the engine did not finish within {self._timeout_s} s"
            ) from None
        except GrammarError as error:
            raise refused(prepared.call, str(error)) from None
        except PeerGone as error:
            raise Refusal(Reason.ENGINE_GONE, f"the engine is gone: {error}") from None
        except RpcError as error:
            raise Refusal(Reason.ENGINE_FAILED, f"the engine failed: {error}") from None
        raise Refusal(Reason.ENGINE_FAILED, "the engine ended without a finish reason")

    def _record(self, prepared: Prepared, turn_id: str, sampled: Sampled) -> None:
        if not sampled.token_ids:
            self.num_aborted += 1
            return
        session, prompt, call = prepared.session, prepared.prompt, prepared.call
        fork = Fork.RESAMPLE if prompt.num_recorded else prompt.fork
        record = TurnRecord(
            rollout_id=session.rollout_id,
            turn_id=turn_id,
            parent_turn_id=prompt.parent.turn_id if prompt.parent else None,
            fork=fork,
            context_token_ids=prompt.context,
            token_ids=int32(sampled.token_ids),
            rollout_logprobs=float32(sampled.logprobs),
            versions=int32(sampled.versions),
            finish_reason=sampled.finish_reason or "aborted",
            dialect=call.dialect,
            model=call.model,
            temperature=prepared.request.temperature,
            top_p=prepared.request.top_p,
            started_at=prepared.started_at,
            ended_at=time.time(),
            num_prompt_tokens=prompt.num_tokens,
            engine_digest=sampled.engine_digest,
            constrained=bool(prepared.request.grammar),
            streamed=call.stream,
            answer_id=prepared.answer_id,
            retry=call.retry,
            num_tools=len(call.tools),
            continues_turn_id=prompt.continues.turn_id if prompt.continues else None,
        )
        self._journal.append(record)
        prepared.num_sampled_tokens += len(sampled.token_ids)
        answer = sampled.answer()
        turn = session.history.add_turn(
            turn_id, prompt, record.token_ids, answer, sampled.answer_with_stop()
        )
        if session.transcript is not None:
            session.transcript.add(
                turn, answer, record.finish_reason, constrained=record.constrained
            )
        session.turn_ids.add(turn_id)
        session.last_call = record.finish_reason
        self.num_turns += 1
        self.num_aborted += sampled.finish_reason is None
        self.forks[fork] += 1
        self.num_prompt_tokens += prompt.num_tokens
        self.num_sampled_tokens += len(sampled.token_ids)


class _Outbox:
    """What the choices of one call have for their reader, merged until it is fetched."""

    def __init__(self) -> None:
        self._pending: dict[int, Delta] = {}
        self._failure: Refusal | None = None
        self._filled = asyncio.Event()

    def put(self, index: int, delta: Delta) -> None:
        pending = self._pending.setdefault(index, delta)
        if pending is not delta:
            pending.add(delta)
        self._filled.set()

    def fail(self, refusal: Refusal) -> None:
        self._failure = self._failure or refusal
        self._filled.set()

    async def get(self) -> list[tuple[int, Delta]]:
        """Everything since the last time; waits for something. Raises the failure, at the end."""
        await self._filled.wait()
        self._filled.clear()
        if not self._pending and self._failure is not None:
            raise self._failure
        deltas = list(self._pending.items())
        self._pending.clear()
        if self._failure is not None:
            self._filled.set()
        return deltas


def rest_of(request: GenerateRequest, token_ids: Sequence[int]) -> GenerateRequest:
    """What is still to be sampled of `request` when `token_ids` have been."""
    if not token_ids:
        return request
    return replace(
        request,
        prompt_token_ids=int32(np.concatenate([request.prompt_token_ids, int32(token_ids)])),
        max_new_tokens=request.max_new_tokens - len(token_ids),
    )


def choice_turn_id(answer_id: str, index: int) -> str:
    """The first choice's turn has the answer's id; those of the others are derived from it."""
    return answer_id if index == 0 else f"{answer_id}-{index}"


def sampling_of(call: Call, sampling: Sampling) -> tuple[float, float, int]:
    """(temperature, top_p, top_k) to sample with."""
    if sampling.override_agent:
        return sampling.temperature, sampling.top_p, sampling.top_k
    temperature = sampling.temperature if call.temperature is None else call.temperature
    if temperature < MIN_TEMPERATURE:
        temperature = 0.0
    top_p = sampling.top_p if call.top_p is None else call.top_p
    top_k = sampling.top_k if call.top_k is None else call.top_k
    # OpenAI takes top_p = 0 for "the likeliest token"; engines want a share above 0.
    return (temperature, top_p, top_k) if top_p > 0 else (temperature, 1.0, 1)
