"""What a run has done so far: counted by the loop, shown by the terminal, returned to callers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from areal_sub.records import Outcome
from areal_sub.schedulers.service import Incident
from areal_sub.trainer.exactness import Exactness
from areal_sub.trajectory.accounting import Accounting
from areal_sub.trajectory.tree import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Grading:
    """What the grader has done so far."""

    name: str
    num_graded: int
    num_retried: int
    num_failed: int


@dataclass(kw_only=True)
class Progress:
    """What the run has done so far; the terminal shows it while it goes on."""

    num_steps: int
    step: int = 0
    went_on_from: int = 0  # the step that an earlier attempt had come to
    rows: list[dict[str, Any]] = field(default_factory=list)
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    examples: dict[Outcome, str] = field(default_factory=dict)  # first error of each kind
    exactness: Exactness = field(default_factory=Exactness)  # of what steps were taken on
    num_stale: int = 0
    num_rollouts: int = 0
    num_tokens: int = 0  # sampled
    grading: Grading | None = None  # None: the agents' own word counts
    tampering: dict[str, int] = field(default_factory=dict)  # by what it is
    tampering_examples: dict[str, list[str]] = field(default_factory=dict)
    incidents: list[Incident] = field(default_factory=list)  # processes of ours that ended
    accounting: Accounting | None = None  # of the whole run, once it has ended
    doing: str = "starting"
    doing_since: float = field(default_factory=time.monotonic)
    queues: Callable[[], dict[str, int]] = dict  # what waits where, by its name
    listener: Callable[[Progress], None] = lambda _: None

    def now(self, doing: str) -> None:
        self.doing, self.doing_since = doing, time.monotonic()
        self.listener(self)

    def to_status(self) -> dict[str, Any]:
        """For `areal-sub status`; called from another thread."""
        return {
            "step": self.step,
            "num_steps": self.num_steps,
            "doing": self.doing,
            "doing_for_s": time.monotonic() - self.doing_since,
            "queues": self.queues(),
            "incidents": [str(incident) for incident in list(self.incidents)],
        }

    def saw(self, trajectory: Trajectory) -> None:
        end = trajectory.end
        self.num_rollouts += 1
        self.outcomes[end.outcome] += 1
        if end.outcome is not Outcome.COMPLETED:
            self.examples.setdefault(end.outcome, end.error)
        for turn in trajectory.turns.values():
            self.num_tokens += len(turn.token_ids)
        self.listener(self)
