"""The control plane: what the trainer asks of the proxy, on the Unix socket.

`open_rollout` and `end_rollout` bracket a rollout's records in the journal; `stop_rollout`, between
them, stops its calls and gives its transcript, for a grader; `subscribe` is the record stream;
`info` and `stats` are what they say. No agent can reach any of this.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from areal_sub.errors import RecordError
from areal_sub.proxy.listeners import Listeners
from areal_sub.proxy.refusals import Reason
from areal_sub.proxy.sessions import Sampling, Session, Sessions
from areal_sub.proxy.tampering import Sign
from areal_sub.proxy.transcript import Transcript
from areal_sub.proxy.turns import Turns
from areal_sub.records import EndRecord, OpenRecord, Outcome, TurnRecord, decode_record
from areal_sub.rpc import Handler, Params
from areal_sub.trajectory.journal import Journal
from areal_sub.trajectory.tree import Trajectory


class Control:
    def __init__(
        self,
        *,
        sessions: Sessions,
        turns: Turns,
        journal: Journal,
        listeners: Listeners,
        agent_port: int,
        max_model_len: int,
    ) -> None:
        self._listeners = listeners
        self._sessions = sessions
        self._turns = turns
        self._journal = journal
        self._info = {
            "agent_port": agent_port,
            "max_model_len": max_model_len,
            # Where this process's records begin, for a reader that wants no earlier ones.
            "journal_offset": journal.end,
        }

    def handlers(self) -> dict[str, Handler]:
        return {
            "info": self.info,
            "open_rollout": self.open_rollout,
            "stop_rollout": self.stop_rollout,
            "end_rollout": self.end_rollout,
            "import_rollout": self.import_rollout,
            "subscribe": self.subscribe,
            "acknowledge": self.acknowledge,
            "stats": self.stats,
        }

    async def info(self, params: Params) -> dict[str, int]:
        return self._info

    async def open_rollout(self, params: Params) -> dict[str, Any]:
        session = Session(
            rollout_id=params["rollout_id"],
            key=params["key"],
            max_turns=params["max_turns"],
            sampling=Sampling(**params["gconfig"]),
            transcript=Transcript() if params.get("transcript") else None,
        )
        self._sessions.open(session)
        record = OpenRecord(
            rollout_id=session.rollout_id,
            group_id=params["group_id"],
            task_id=params["task_id"],
            split=params["split"],
            policy_version=params["policy_version"],
            opened_at=time.time(),
            agent=params.get("agent", ""),
        )
        try:
            self._journal.append(record)
        except BaseException:
            await self._sessions.close(session.rollout_id)
            raise
        return {}

    async def stop_rollout(self, params: Params) -> dict[str, Any]:
        """Stop the rollout's calls; what was said in it, where it was opened with `transcript`."""
        session = await self._sessions.stop(params["rollout_id"])
        transcript = session.transcript
        return {"transcript": transcript.to_map() if transcript is not None else None}

    async def end_rollout(self, params: Params) -> dict[str, Any]:
        """Stop the rollout's calls, then write its end record, which is its last."""
        cut_off = params["outcome"] == Outcome.CANCELLED
        session = await self._sessions.close(params["rollout_id"], cut_off=cut_off)
        self._listeners.close_rollout(session.rollout_id)
        if (difference := claim_difference(params)) is not None:
            self._sessions.note(Sign.CLAIM_DIFFERS, difference, [session])
        record = end_record(session, params)
        self._journal.append(record)
        return {"outcome": record.outcome, "num_turns": record.num_turns}

    async def import_rollout(self, params: Params) -> dict[str, Any]:
        """Record a whole rollout that was run elsewhere. Raises `RecordError` where it is none."""
        records = [decode_record(raw) for raw in params["records"]]
        opened, *turns, end = records
        if not isinstance(opened, OpenRecord) or not isinstance(end, EndRecord):
            raise RecordError("an imported rollout goes from its open record to its end record")
        if self._sessions.is_open(opened.rollout_id):
            raise RecordError(f"rollout {opened.rollout_id} is open here")
        Trajectory.build(opened, [t for t in turns if isinstance(t, TurnRecord)], end)
        for record in records:
            self._journal.append(record)
        return {}

    async def subscribe(self, params: Params) -> AsyncIterator[dict[str, Any]]:
        async for offset, records in self._journal.follow(params.get("offset", 0)):
            yield {"offset": offset, "records": records}

    async def acknowledge(self, params: Params) -> dict[str, Any]:
        """The reader has done with all rollouts whose records begin before `offset`."""
        self._journal.acknowledge(params["offset"])
        return {}

    async def stats(self, params: Params) -> dict[str, Any]:
        turns, sessions = self._turns, self._sessions
        return {
            "num_requests": turns.num_requests,
            "num_rejected": dict(sessions.num_rejected),
            "tampering": sessions.tampering.to_map(),
            "num_open": len(sessions),
            "num_turns": turns.num_turns,
            "num_aborted": turns.num_aborted,
            "forks": dict(turns.forks),
            "num_prompt_tokens": turns.num_prompt_tokens,
            "num_sampled_tokens": turns.num_sampled_tokens,
        }


# How an agent ends that does not get over what its last call came to, and what that then means.
_AGENT_GAVE_UP = (Outcome.EXCEPTION, Outcome.EXITED, Outcome.INVALID_RESULT)
_BECAUSE_OF = {
    Reason.CONTEXT_LENGTH: Outcome.CONTEXT_LIMIT,
    Reason.TURN_LIMIT: Outcome.TURN_LIMIT,
    "length": Outcome.LENGTH_LIMIT,
    Reason.ENGINE_GONE: Outcome.LOST,
    Reason.ENGINE_FAILED: Outcome.LOST,
    Reason.DEADLINE: Outcome.LOST,
    Reason.INTERNAL: Outcome.LOST,
}


def claim_difference(params: Mapping[str, Any]) -> str | None:
    """What an agent claimed, where it is not what its grader found; per turn counts by its sum."""
    claim = params.get("claimed_reward")
    if claim is None or params["outcome"] != Outcome.COMPLETED:
        return None
    claimed = sum(claim.values()) if isinstance(claim, dict) else claim
    reward = params["reward"]
    graded = sum(params["turn_rewards"].values()) if reward is None else reward
    if math.isclose(claimed, graded, rel_tol=1e-6, abs_tol=1e-6):
        return None
    return f"claimed {claimed:g}, graded {graded:g}"


def end_record(session: Session, params: Mapping[str, Any]) -> EndRecord:
    """The end of a rollout, with the outcome that its turns and rewards allow."""
    outcome, error = Outcome(params["outcome"]), params["error"]
    reward, turn_rewards = params["reward"], dict(params["turn_rewards"])
    if outcome is Outcome.COMPLETED:
        unknown = [turn_id for turn_id in turn_rewards if not _turns_of(session, turn_id)]
        values = [*turn_rewards.values(), *([] if reward is None else [reward])]
        if not session.turn_ids:
            outcome, error = Outcome.NO_TURNS, "a reward, but no model call to train"
        elif unknown:
            outcome = Outcome.INVALID_RESULT
            error = (
                f"a reward for {unknown[0][:100]!r}, which is no completion of this rollout: keys "
                "are the ids of its answers; the reward of the whole rollout is a number by itself"
            )
        elif not values or not all(math.isfinite(value) for value in values):
            outcome, error = Outcome.INVALID_RESULT, f"no finite reward among {values[:8]}"
    elif outcome in _AGENT_GAVE_UP:
        # What cannot be read of a cut-off answer raises; who exits, or returns, has read it.
        if session.last_call != "length" or outcome is Outcome.EXCEPTION:
            outcome = _BECAUSE_OF.get(session.last_call, outcome)
    elif outcome is Outcome.START_FAILED and session.turn_ids:
        # So says who would rather be run again: code of the agent's import, say.
        outcome, error = Outcome.EXITED, f"it had started, and called the model: {error}"
    elif outcome is Outcome.TIMEOUT and session.engine_went:
        outcome, error = Outcome.LOST, f"there was no engine for part of its time: {error}"
    if outcome is not Outcome.COMPLETED:
        reward, turn_rewards = None, {}
    return EndRecord(
        rollout_id=session.rollout_id,
        outcome=outcome,
        reward=reward,
        turn_rewards=_by_turn(session, turn_rewards),
        error=error,
        traceback=params["traceback"],
        stdout_tail=params["stdout_tail"],
        stderr_tail=params["stderr_tail"],
        wall_s=params["wall_s"],
        cpu_s=params["cpu_s"],
        max_rss_bytes=params["max_rss_bytes"],
        egress_refused=dict(params["egress_refused"]),
        num_turns=len(session.turn_ids),
        num_rejected_calls=session.num_rejected,
        ended_at=time.time(),
        written_bytes=params["written_bytes"],
        claimed_reward=_claim(session, params.get("claimed_reward")),
        tampering=dict(session.tampering),
        peak_memory_bytes=params["peak_memory_bytes"],
    )


def _claim(
    session: Session, claim: float | dict[str, float] | None
) -> float | dict[str, float] | None:
    """For turns that there are; what else an agent names may be of any size."""
    if isinstance(claim, dict):
        return {turn_id: value for turn_id, value in claim.items() if _turns_of(session, turn_id)}
    return claim


def _by_turn(session: Session, rewards: Mapping[str, float]) -> dict[str, float]:
    """A completion's reward is each of its choices', but where a choice has one of its own."""
    spread = {
        turn_id: float(reward)
        for completion_id, reward in rewards.items()
        for turn_id in _turns_of(session, completion_id)
    }
    own = {turn_id: float(reward) for turn_id, reward in rewards.items() if turn_id in spread}
    first = {ids[0] for ids in session.choices.values()}
    return spread | {turn_id: reward for turn_id, reward in own.items() if turn_id not in first}


def _turns_of(session: Session, turn_id: str) -> list[str]:
    """The recorded turns that an id means: all choices of a completion, or the one turn."""
    ids = session.choices.get(turn_id, [turn_id])
    return [each for each in ids if each in session.turn_ids]
