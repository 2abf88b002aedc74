"""Who says what a rollout is worth where that is not the agent: the grader, in the trainer's words.

Called by `attempt` for each rollout that came to its end, when every process of the agent is gone.
The grader itself runs in a child of the supervisor (`workflow/graded`); what comes back from there
is checked as an agent's result is. Its failures are nobody's but its own: tried twice, then the
rollout is `grader_failed`, which no group and no evaluation counts.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Mapping
from typing import Any

from areal_sub.config.schema import OpenAIConfig
from areal_sub.errors import ArealSubError, WorkflowError
from areal_sub.records import Outcome, RunReport, RunRequest
from areal_sub.rollout.pool import SubprocPool
from areal_sub.rollout.rewards import Verdict, claim_of, judge_result

log = logging.getLogger(__name__)

NUM_ATTEMPTS = 2

GRADED = frozenset({Outcome.COMPLETED, Outcome.INVALID_RESULT})
"""Ends of an agent that are graded: what it returned, if anything, plays no part."""


class Grader:
    """Grades any number of rollouts at once."""

    def __init__(self, pool: SubprocPool, config: OpenAIConfig) -> None:
        self.name = config.reward
        self.num_graded = 0
        self.num_retried = 0
        self.num_failed = 0
        self._pool = pool
        self._kwargs = config.reward_kwargs
        self._timeout_s = config.reward_timeout_s

    async def warm(self) -> list[str]:
        """Import the grader now. Returns notes; raises `WorkflowError` with its traceback."""
        try:
            return await self._pool.warm(self.name, grader=True)
        except WorkflowError as error:
            raise WorkflowError(f"rollout.openai.reward={self.name}: {error}") from None

    async def grade(
        self, task: dict[str, Any], transcript: Mapping[str, Any], report: RunReport
    ) -> Verdict:
        """`transcript`: as the proxy's `stop_rollout` gives it. Raises nothing."""
        claim = claim_of(report)
        turn_ids = {turn["message"]["turn_id"] for turn in transcript["turns"]}
        if not turn_ids:  # the proxy has a name for that
            return Verdict(outcome=Outcome.COMPLETED, claimed_reward=claim)
        request = RunRequest(
            rollout_id=report.rollout_id,
            target=self.name,
            pickled=b"",
            workflow_kwargs=self._kwargs,
            data=grader_data(task, transcript, report),
            env={},
            timeout_s=self._timeout_s,
            grader=True,
        )
        failure = Verdict(outcome=Outcome.GRADER_FAILED)
        for attempt in range(NUM_ATTEMPTS):
            self.num_retried += attempt > 0
            try:
                graded = await self._pool.run(request)
                verdict = verdict_of(graded, turn_ids)
            except ArealSubError as error:  # the supervisor went, or does not answer
                verdict = Verdict(outcome=Outcome.GRADER_FAILED, error=str(error))
            if verdict.outcome is Outcome.COMPLETED:
                self.num_graded += 1
                return Verdict(
                    outcome=Outcome.COMPLETED,
                    reward=verdict.reward,
                    turn_rewards=verdict.turn_rewards,
                    claimed_reward=claim,
                )
            failure = verdict
        self.num_failed += 1
        text = f"the grader {self.name} failed: {failure.error}"
        log.warning("rollout %s: %s", report.rollout_id, text)
        return Verdict(
            outcome=Outcome.GRADER_FAILED,
            error=text,
            traceback=failure.traceback,
            claimed_reward=claim,
        )


def grader_data(
    task: dict[str, Any], transcript: Mapping[str, Any], report: RunReport
) -> dict[str, Any]:
    """What the child gets, in JSON types: see `docs/rewards.md`, and `workflow/graded`."""
    return {
        "task": task,
        "transcript": {"prompts": transcript["prompts"], "turns": transcript["turns"]},
        "outputs": {
            path: base64.b64encode(content).decode() for path, content in report.outputs.items()
        },
        "report": {
            "rollout_id": report.rollout_id,
            "num_turns": len(transcript["turns"]),
            "wall_s": report.wall_s,
            "cpu_s": report.cpu_s,
            "exit_code": report.exit_code,
            "stdout_tail": report.stdout_tail,
            "stderr_tail": report.stderr_tail,
            "outputs_refused": report.outputs_refused,
            "outputs_missing": report.outputs_missing,
        },
    }


def verdict_of(graded: RunReport, turn_ids: set[str]) -> Verdict:
    """COMPLETED with a reward, or GRADER_FAILED with what went wrong."""
    if graded.outcome is not Outcome.COMPLETED:
        last = graded.traceback or graded.stderr_tail
        error = f"{graded.outcome}: {graded.error}"
        return Verdict(outcome=Outcome.GRADER_FAILED, error=error, traceback=last)
    try:
        reward, turn_rewards = judge_result(graded.result, "it")
    except WorkflowError as error:
        return Verdict(outcome=Outcome.GRADER_FAILED, error=str(error))
    unknown = [turn_id for turn_id in turn_rewards if turn_id not in turn_ids]
    if unknown or (reward is None and not turn_rewards):
        what = f"a reward for {unknown[0][:100]!r}, which is no turn" if unknown else "no reward"
        return Verdict(outcome=Outcome.GRADER_FAILED, error=f"it returned {what}")
    return Verdict(outcome=Outcome.COMPLETED, reward=reward, turn_rewards=turn_rewards)
