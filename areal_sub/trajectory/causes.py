"""Why a rollout's tree branches, which of its answers were lost, and which branch is the main one.

Pure, over a finished `Trajectory` alone, so that a journal that is read again says the same. Two
turns belong to one *conversation* where one goes on from the other: by its tokens (the parent), or
only by what was said (`continues_turn_id`: thinking that was stripped, a summary, edits).

Lost answers. A client that repeats a call because it never got the answer leaves two answers to one
prompt, and the agent has seen one of them. What tells such a call from one that an agent makes
twice on purpose is in the records: the answer was cut off (`aborted`), or the later call says to be
a retry. Of calls that are one call repeated, the real one is that from which a later turn goes on,
or which the agent rewarded; else the last that was answered in full. All others are lost.

Called by `samples.py`, by the trainer for its counters, and by whatever shows a trajectory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from areal_sub.records import Fork, TurnRecord
from areal_sub.trajectory.tree import Trajectory

ABORTED = "aborted"
# Another agent's beginnings, as far as the messages tell.
_APART = (Fork.ROOT, Fork.NEW_CONVERSATION, Fork.SUB_AGENT)


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """The turns of one model call: several with `n` > 1."""

    turns: tuple[TurnRecord, ...]
    is_seen: bool  # the agent went on from it, or rewarded it

    @property
    def is_full(self) -> bool:
        return all(turn.finish_reason != ABORTED for turn in self.turns)

    @property
    def started_at(self) -> float:
        return min(turn.started_at for turn in self.turns)

    @property
    def ended_at(self) -> float:
        return max(turn.ended_at for turn in self.turns)

    def may_repeat(self, other: _Call) -> bool:
        """Whether it says to repeat a call, and `other` can be that."""
        return (
            self.turns[0].retry > other.turns[0].retry
            and not other.is_seen
            and other.ended_at <= self.started_at
        )


def before(turn: TurnRecord) -> str | None:
    """The turn after which `turn`'s conversation goes on with it."""
    return turn.continues_turn_id or turn.parent_turn_id


def lost_answers(trajectory: Trajectory) -> frozenset[str]:
    """Ids of the turns that the agent never saw, as it repeated their calls."""
    lost: set[str] = set()
    for calls in _repeated_calls(trajectory):
        chains = _chains(calls)
        real = [call for chain in chains for call in _real(chain)]
        if not real:
            real = calls[-1:]  # no answer came whole: the last one is what there is
        lost |= {turn.turn_id for call in calls if call not in real for turn in call.turns}
    return frozenset(lost)


def main_branch(trajectory: Trajectory) -> frozenset[str]:
    """Ids of the turns of the main conversation, from its first turn to its last.

    Of all ways from a first turn to a last one, without lost answers: that of the most turns; of
    those the one whose calls offer more tools, then the one with more rewarded turns, then that
    which sampled more, then the one that ends last. Its model name is the main one.
    """
    return frozenset(turn.turn_id for turn in _main_path(trajectory, lost_answers(trajectory)))


def causes(trajectory: Trajectory) -> dict[str, Fork]:
    """Why each turn stands where it stands: `NONE` where it simply goes on; turn ids in order."""
    lost = lost_answers(trajectory)
    path = _main_path(trajectory, lost)
    main_model = path[-1].model if path else ""
    conversations = _conversations(trajectory)
    first_fork: dict[object, Fork] = {}  # by prompt: of the first turn, which those after repeat
    asked: set[object] = set()  # prompts of which an answer was not lost
    earlier: dict[str | None, list[TurnRecord]] = {}  # by parent, without lost ones
    out: dict[str, Fork] = {}
    for turn_id, turn in trajectory.turns.items():
        prompt = _prompt(turn)
        fork = first_fork.setdefault(prompt, turn.fork)
        if turn_id in lost:
            out[turn_id] = Fork.LOST_ANSWER
            continue
        siblings = earlier.setdefault(turn.parent_turn_id, [])
        if fork in _APART and _is_side_request(conversations[turn_id], main_model):
            out[turn_id] = Fork.SIDE_REQUEST
        else:
            out[turn_id] = _cause(turn, Fork.RESAMPLE if prompt in asked else fork, siblings)
        siblings.append(turn)
        asked.add(prompt)
    return out


def _is_side_request(conversation: Sequence[TurnRecord], main_model: str) -> bool:
    if any(turn.model == main_model for turn in conversation):
        return False
    calls = {_answer_id(turn) for turn in conversation}
    return len(calls) == 1 or not any(turn.num_tools for turn in conversation)


def _cause(turn: TurnRecord, fork: Fork, siblings: Sequence[TurnRecord]) -> Fork:
    """`siblings`: turns recorded before it that go on from where it goes on."""
    if fork not in (Fork.NONE, Fork.RESAMPLE, Fork.NEW_CONVERSATION):
        return fork
    others = [other for other in siblings if _answer_id(other) != _answer_id(turn)]
    if len(others) < len(siblings):
        return Fork.CHOICE
    if any(_overlap(turn, other) for other in others):
        return Fork.PARALLEL
    return Fork.BRANCH if others and fork is Fork.NONE else fork


def _answer_id(turn: TurnRecord) -> str:
    return turn.answer_id or turn.turn_id


def _overlap(turn: TurnRecord, other: TurnRecord) -> bool:
    return turn.started_at < other.ended_at and other.started_at < turn.ended_at


def _prompt(turn: TurnRecord) -> tuple[str | None, bytes]:
    return turn.parent_turn_id, turn.context_token_ids.tobytes()


def _repeated_calls(trajectory: Trajectory) -> list[list[_Call]]:
    """The calls that asked for the same, each at least two, in the order in which they started."""
    followed = {before(turn) for turn in trajectory.turns.values()}
    followed |= {turn.parent_turn_id for turn in trajectory.turns.values()}
    followed |= trajectory.end.turn_rewards.keys()
    same: dict[object, dict[str, list[TurnRecord]]] = {}
    for turn in trajectory.turns.values():
        asked = (*_prompt(turn), turn.dialect, turn.model, turn.num_tools)
        same.setdefault(asked, {}).setdefault(_answer_id(turn), []).append(turn)
    return [
        sorted(
            (
                _Call(tuple(turns), any(turn.turn_id in followed for turn in turns))
                for turns in calls.values()
            ),
            key=lambda call: call.started_at,
        )
        for calls in same.values()
        if len(calls) > 1
    ]


def _chains(calls: Sequence[_Call]) -> list[list[_Call]]:
    """`calls` by what was one call for the agent: each repeats the one before it."""
    chains: list[list[_Call]] = []
    for call in calls:
        repeated = [chain for chain in chains if call.may_repeat(chain[-1])]
        # Rather one that was cut off than one that was not, and rather the last.
        cut = [chain for chain in repeated if not chain[-1].is_full]
        if repeated:
            (cut or repeated)[-1].append(call)
        else:
            chains.append([call])
    return chains


def _real(chain: Sequence[_Call]) -> Sequence[_Call]:
    seen = [call for call in chain if call.is_seen]
    return seen or [call for call in chain if call.is_full][-1:]


def _conversations(trajectory: Trajectory) -> dict[str, list[TurnRecord]]:
    """Each turn's conversation: all turns that begin where it does."""
    of: dict[str, list[TurnRecord]] = {}
    for turn_id, turn in trajectory.turns.items():
        previous = before(turn)
        of[turn_id] = of[previous] if previous is not None else []
        of[turn_id].append(turn)
    return of


def _main_path(trajectory: Trajectory, lost: frozenset[str]) -> list[TurnRecord]:
    """The main conversation's turns, the last one last. See `main_branch`."""
    worth: dict[str, tuple[int, int, int, int]] = {}  # of the way that ends with the turn
    best: str | None = None
    rewarded = trajectory.end.turn_rewards
    for turn_id, turn in trajectory.turns.items():
        if turn_id in lost:
            continue
        turns, tools, rewards, tokens = worth.get(before(turn) or "", (0, 0, 0, 0))
        worth[turn_id] = (
            turns + 1,
            tools + turn.num_tools,
            rewards + (turn_id in rewarded),
            tokens + len(turn.token_ids),
        )
        if best is None or worth[turn_id] >= worth[best]:
            best = turn_id
    path: list[TurnRecord] = []
    while best is not None:
        path.append(trajectory.turns[best])
        best = before(path[-1])
    return path[::-1]
