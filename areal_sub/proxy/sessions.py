"""Which rollout is calling: keys, limits, and what is running for each.

Owns: `Session` (one open rollout), `Sessions` (all of them, by key). Invariants: a key belongs to
one rollout for ever; a closed session starts nothing any more; a session's memory is freed when it
ends, and a digest of its key stays, of which the last `MAX_FINISHED_KEYS` tell them from unknown
ones. The control plane opens and closes, the agent plane authenticates.

With a grader a rollout ends in two steps: `stop_rollout` closes the session, whose transcript is
then graded, and `end_rollout` takes it out.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np

from areal_sub.errors import ArealSubError, RolloutLost, RpcError
from areal_sub.proxy.history import History
from areal_sub.proxy.kept import KeptAnswers
from areal_sub.proxy.refusals import Reason, Refusal
from areal_sub.proxy.seen import Seen
from areal_sub.proxy.tampering import Sign, Tampering
from areal_sub.proxy.transcript import Transcript

MAX_FINISHED_KEYS = 65_536
# Of one rollout, at once: what its calls may take of the proxy's memory.
MAX_CALLS = 128
MAX_CALLS_BYTES = 64 * 2**20
# After a long call, a rollout's next long one is read this many times as long later as that took:
# meanwhile others' calls are.
PAUSE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """`gconfig` of the rollout: see `GenerationConfig`."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    override_agent: bool


@dataclass(slots=True, eq=False, kw_only=True)
class Session:
    rollout_id: str
    key: str
    max_turns: int
    sampling: Sampling
    history: History = field(default_factory=History)
    kept: KeptAnswers = field(default_factory=KeptAnswers)
    seen: Seen = field(default_factory=Seen)
    choices: dict[str, list[str]] = field(default_factory=dict)  # answer id → its turns' ids
    turn_ids: set[str] = field(default_factory=set)  # recorded
    num_admitted: int = 0  # turns that were asked for
    num_rejected: int = 0
    transcript: Transcript | None = None  # for a grader
    last_call: str = ""  # how its latest call ended: a `Reason`, a finish reason
    tampering: Counter[str] = field(default_factory=Counter)  # by `Sign`
    engine_went: bool = False  # a call of it waited for an engine that was not there
    is_open: bool = True
    running: set[asyncio.Task[Any]] = field(default_factory=set)  # to be cancelled at its end
    _stopped: asyncio.Event = field(default_factory=asyncio.Event)  # closed, and nothing runs
    # Held while a large call is rendered: threads are few, and one rollout takes one at most.
    rendering: asyncio.Lock = field(default_factory=asyncio.Lock)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    _rests_until: float = 0.0  # no long call is read before, by the monotonic clock
    num_calls: int = 0  # that are not answered yet
    num_call_bytes: int = 0  # of those

    def calling(self) -> Calling:
        return Calling(self)

    async def take_turn(self, *, is_long: bool) -> None:
        """Before a call is read, at once: one by one, between which others' are, too, and of long
        ones not all on end."""
        await self._turn.acquire()
        try:
            if is_long:
                await asyncio.sleep(max(0.0, self._rests_until - time.monotonic()))
        except BaseException:
            self._turn.release()
            raise
        # When this one was read.
        asyncio.get_running_loop().call_soon(self._end_turn, is_long, time.monotonic())

    def _end_turn(self, was_long: bool, began_at: float) -> None:
        if was_long:
            now = time.monotonic()
            self._rests_until = now + PAUSE * (now - began_at)
        self._turn.release()

    def admit(self, num_turns: int) -> None:
        """Count `num_turns` more against the rollout's limit. Raises `Refusal`."""
        if self.num_admitted + num_turns > self.max_turns:
            raise Refusal(
                Reason.TURN_LIMIT,
                f"this rollout may make {self.max_turns} model calls and has made "
                f"{self.num_admitted}; {num_turns} more would exceed that "
                "(rollout.openai.max_turns)",
            )
        self.num_admitted += num_turns

    def check_open(self) -> None:
        if not self.is_open:
            raise finished()

    async def close(self) -> None:
        """Refuse everything from now on, and wait, within the caller's limit, for what runs to have
        stopped."""
        self.is_open = False
        if self.running:
            for task in self.running:
                task.cancel()
            await self._stopped.wait()

    def ended(self, task: asyncio.Task[Any]) -> None:
        """The task, one of `running`, samples no more."""
        self.running.discard(task)
        if not (self.is_open or self.running):
            self._stopped.set()


class Calling:
    """A call, from its head to the end of its answer."""

    __slots__ = ("_num_bytes", "_session")

    def __init__(self, session: Session) -> None:
        self._session = session
        self._num_bytes = 0

    def __enter__(self) -> Callable[[int], None]:
        """What to tell of each part of its body. Both raise `Refusal` where it is too much."""
        if self._session.num_calls >= MAX_CALLS:
            raise Refusal(
                Reason.TOO_MANY_CALLS, f"this rollout has {MAX_CALLS} calls under way already"
            )
        self._session.num_calls += 1
        return self._take

    def _take(self, num_bytes: int) -> None:
        if self._session.num_call_bytes + num_bytes > MAX_CALLS_BYTES:
            raise Refusal(
                Reason.TOO_LARGE,
                f"The calls of this rollout that are under way are larger than "
                f"{MAX_CALLS_BYTES} bytes together.",
            )
        self._num_bytes += num_bytes
        self._session.num_call_bytes += num_bytes

    def __exit__(self, *error: object) -> None:
        self._session.num_calls -= 1
        self._session.num_call_bytes -= self._num_bytes


_ENDED = "Incorrect API key provided: its rollout has ended."


def finished() -> Refusal:
    return Refusal(Reason.FINISHED_KEY, _ENDED)


class KeyMisuse(Refusal):
    """A key where it does not belong. `callers`: who may have done it."""

    def __init__(
        self, reason: Reason, message: str, sign: Sign, callers: Iterable[Session] = ()
    ) -> None:
        super().__init__(reason, message)
        self.sign = sign
        self.callers = tuple(callers)


def _after_end(callers: Iterable[Session] = ()) -> KeyMisuse:
    return KeyMisuse(Reason.FINISHED_KEY, _ENDED, Sign.CALL_AFTER_END, callers)


def _foreign(
    concerned: Iterable[Session], callers: Iterable[Session], *, has_ended: bool
) -> KeyMisuse:
    """Counted as refused for all rollouts that it concerns, held against those who may have
    called."""
    for session in concerned:
        session.num_rejected += 1
    return KeyMisuse(
        Reason.FOREIGN_KEY,
        "Incorrect API key provided: it belongs to another rollout.",
        Sign.FINISHED_KEY if has_ended else Sign.FOREIGN_KEY,
        callers,
    )


class FinishedKeys:
    """The last `MAX_FINISHED_KEYS` of them, as digests in memory that is taken once: what stays of
    a rollout does not grow with the run. To look takes some 20 us: ask for no open key."""

    def __init__(self) -> None:
        self._digests = np.zeros(MAX_FINISHED_KEYS, np.uint64)
        self._num_added = 0

    def add(self, key: str) -> None:
        self._digests[self._num_added % MAX_FINISHED_KEYS] = _digest(key)
        self._num_added += 1

    def __contains__(self, key: str) -> bool:
        return bool(key) and bool((self._digests == _digest(key)).any())


def _digest(key: str) -> int:
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little") or 1


class Sessions:
    def __init__(self, lost: Collection[str] = ()) -> None:
        """`lost`: rollouts that an earlier process had open, and that have been ended."""
        self._lost = lost
        self._by_key: dict[str, Session] = {}
        self._by_rollout: dict[str, Session] = {}
        self._finished = FinishedKeys()
        self._cut_off = FinishedKeys()  # those of them whose agents may not have known yet
        self.num_rejected: Counter[str] = Counter()  # by `Reason`
        self.tampering = Tampering()

    def __len__(self) -> int:
        return len(self._by_key)

    def open(self, session: Session) -> None:
        """Raises `RpcError` where the key or the rollout is known already, `RolloutLost`."""
        if session.rollout_id in self._lost:
            raise self._was_lost(session.rollout_id)
        if session.key in self._by_key or session.key in self._finished:
            raise RpcError(f"rollout {session.rollout_id}: its key is another rollout's")
        if session.rollout_id in self._by_rollout:
            raise RpcError(f"rollout {session.rollout_id} is open already")
        self._by_key[session.key] = session
        self._by_rollout[session.rollout_id] = session

    async def stop(self, rollout_id: str) -> Session:
        """Stop the rollout's session, which stays here. Raises `RpcError` where there is none,
        `RolloutLost`."""
        session = self._by_rollout.get(rollout_id)
        if session is None:
            raise self._not_open(rollout_id)
        await session.close()
        return session

    async def close(self, rollout_id: str, *, cut_off: bool = False) -> Session:
        """Take the rollout's session out and stop it. `cut_off`: its agent may still be running,
        so a call of it is no sign of anything. Raises `RpcError` where there is none,
        `RolloutLost`."""
        session = self._by_rollout.pop(rollout_id, None)
        if session is None:
            raise self._not_open(rollout_id)
        del self._by_key[session.key]
        self._finished.add(session.key)
        if cut_off:
            self._cut_off.add(session.key)
        await session.close()
        return session

    def _not_open(self, rollout_id: str) -> ArealSubError:
        if rollout_id in self._lost:
            return self._was_lost(rollout_id)
        return RpcError(f"rollout {rollout_id} is not open")

    def _was_lost(self, rollout_id: str) -> RolloutLost:
        return RolloutLost(f"rollout {rollout_id} was open in another process of the proxy")

    async def close_all(self) -> None:
        for rollout_id in list(self._by_rollout):
            await self.close(rollout_id)

    def is_open(self, rollout_id: str) -> bool:
        session = self._by_rollout.get(rollout_id)
        return session is not None and session.is_open

    def caller(self, rollout_id: str | None, keys: Iterable[str]) -> Session | None:
        """Who makes a call that no route takes, where that can be told."""
        if rollout_id is not None:
            return self._by_rollout.get(rollout_id)
        known = {key: self._by_key[key] for key in keys if key in self._by_key}
        return next(iter(known.values())) if len(known) == 1 else None

    def note(self, sign: Sign, what: str, callers: Iterable[Session], owner: str = "") -> None:
        """Count a sign of tampering, for the run and for those who may have done it. `owner`: whose
        connection it came by, which may have ended."""
        ids = []
        for session in callers:
            session.tampering[sign] += 1
            ids.append(session.rollout_id)
        self.tampering.add(sign, " or ".join(ids) or owner or "somebody", what)

    def authenticate(
        self, path_key: str | None, header_keys: Iterable[str], rollout_id: str | None = None
    ) -> Session:
        """The one session that the call belongs to. Raises `Refusal` (401).

        `rollout_id`: whose connection the call came by, where connections have an owner; else its
        keys say it. Agents may hard-code a key that is no rollout's: it is ignored where something
        else says who is calling. A key of another rollout is refused: it was stolen.
        """
        if rollout_id is not None:
            return self._by_connection(rollout_id, [path_key or "", *header_keys])
        if path_key is not None and path_key not in self._by_key:
            raise self._unknown([path_key])
        keys = [key for key in ([path_key] if path_key is not None else []) + [*header_keys] if key]
        known = {key: self._by_key[key] for key in keys if key in self._by_key}
        if not known:
            raise self._unknown(keys)
        session = next(iter(known.values()))
        has_ended = self._has_finished(keys)
        if len(known) > 1 or has_ended:
            raise _foreign(known.values(), known.values(), has_ended=has_ended)
        return _still_open(session)

    def _by_connection(self, rollout_id: str, keys: list[str]) -> Session:
        session = self._by_rollout.get(rollout_id)
        if session is None:
            raise self._late(keys)
        others = [self._by_key[key] for key in keys if key in self._by_key and key != session.key]
        has_ended = self._has_finished(keys)
        if others or has_ended:
            raise _foreign([session, *others], [session], has_ended=has_ended)
        return _still_open(session)

    def _has_finished(self, keys: Iterable[str]) -> bool:
        return any(key not in self._by_key and key in self._finished for key in keys)

    def _late(self, keys: Iterable[str]) -> Refusal:
        """Of a call by a rollout that is over: no misuse where its end cut the call off."""
        return finished() if any(key in self._cut_off for key in keys) else _after_end()

    def _unknown(self, keys: Sequence[str]) -> Refusal:
        if self._has_finished(keys):
            return self._late(keys)
        message = (
            "Incorrect API key provided: it is no rollout's. Use the OPENAI_BASE_URL and "
            "OPENAI_API_KEY of the agent's environment."
        )
        if any(keys):
            return KeyMisuse(Reason.UNKNOWN_KEY, message, Sign.UNKNOWN_KEY)
        return Refusal(Reason.UNKNOWN_KEY, message)


def _still_open(session: Session) -> Session:
    if not session.is_open:
        raise _after_end([session])
    return session
