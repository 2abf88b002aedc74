"""One rollout from its opening to its trajectory.

    open at the proxy → run the agent (pool or inline) → judge its result → end at the proxy
    → await the trajectory from the record stream

With a grader, judging is: stop the rollout at the proxy, have its transcript graded (`grader`).

Whatever the agent does becomes an outcome on its end record, and so does the end of a process of
ours: where the supervisor goes, or a call to it fails, we end the rollout as `LOST`; where the
proxy goes, its next process does. Either way the record stream says how it ended, and no rollout
waits for what is gone: its agent is stopped as soon as an end record comes that we did not ask for.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from areal_sub.config.schema import GenerationConfig, OpenAIConfig, RolloutConfig
from areal_sub.errors import ArealSubError, PeerGone, RolloutLost, RpcError, TaskError
from areal_sub.records import Outcome, RunReport, RunRequest
from areal_sub.rollout.command import Command, declared_outputs, fill_command
from areal_sub.rollout.environ import agent_environment, import_environment, template_variables
from areal_sub.rollout.grader import GRADED, Grader
from areal_sub.rollout.mix import Agent
from areal_sub.rollout.rewards import Verdict, word_of_the_agent
from areal_sub.rollout.unmeasured import unmeasured_report
from areal_sub.rollout.workspace import workspace_of
from areal_sub.rpc import Client
from areal_sub.trajectory.stream import TrajectoryStream
from areal_sub.trajectory.tree import Trajectory
from areal_sub.waits import uninterrupted

CONTROL_TIMEOUT_S = 60.0


T = TypeVar("T")


class _EndedByProxy(Exception):
    """The rollout's end record came while it was still running."""


class AgentRunner(Protocol):
    """Runs agents: `SubprocPool` or `InlineRunner`."""

    async def warm(
        self,
        target: str,
        pickled: bytes = b"",
        *,
        python: str = "",
        readable: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> list[str]: ...

    async def run(self, request: RunRequest) -> RunReport: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """One rollout to run."""

    rollout_id: str
    group_id: str
    task_id: str
    split: str  # "train" | "valid"
    data: dict[str, Any]
    policy_version: int


class RolloutRunner:
    """Runs assignments; any number at once."""

    def __init__(
        self,
        *,
        proxy: Client,
        proxy_port: int,
        stream: TrajectoryStream,
        agents: AgentRunner,
        config: RolloutConfig,
        grader: Grader | None = None,
        control_timeout_s: float = CONTROL_TIMEOUT_S,
    ) -> None:
        """`control_timeout_s`: of calls to the proxy, while it is restarted, too."""
        self._control_s = control_timeout_s
        self._start_s = config.setup_timeout_s
        self.grader = grader
        self._proxy = proxy
        self._port = proxy_port
        self._stream = stream
        self._agents = agents
        self._timeout_s = config.timeout_s
        self._openai: OpenAIConfig = config.openai
        self._ending: set[str] = set()  # rollouts whose end the proxy was told
        self._base = Path.cwd()  # what paths in the configuration are relative to

    async def run(
        self, assignment: Assignment, agent: Agent, gconfig: GenerationConfig
    ) -> Trajectory:
        """Raises `PeerGone` where the proxy is gone for good, `DeadlineExceeded` where it hangs."""
        key, rollout_id = secrets.token_urlsafe(24), assignment.rollout_id
        self._stream.expect(rollout_id)
        timeout_s = self._control_s
        try:
            await self._open(assignment, agent, key, gconfig)
            report = await self._unless_ended(rollout_id, self._run_agent(assignment, agent, key))
            verdict = await self._unless_ended(rollout_id, self._judge(assignment, report))
            await uninterrupted(self._end(report, verdict))
        except _EndedByProxy:
            pass
        except PeerGone:  # the next proxy ends what this one had open
            timeout_s += self._start_s
        except RpcError as error:
            if error.kind != RolloutLost.__name__:
                self._stream.forget(rollout_id)
                raise
        except asyncio.CancelledError:
            self._stream.forget(rollout_id)
            if rollout_id not in self._ending:  # it came just between two of these
                failure = _our_failure(rollout_id, Outcome.CANCELLED, "", time.monotonic())
                await self._end_cancelled(failure, word_of_the_agent(failure))
            raise
        except BaseException:
            self._stream.forget(rollout_id)
            raise
        finally:
            self._ending.discard(rollout_id)
        return await self._stream.collect(rollout_id, timeout_s=timeout_s)

    async def run_recorded(self, rollout_id: str, records: Sequence[bytes]) -> Trajectory:
        """A rollout that was recorded elsewhere, as if it had been run. Raises as `run` does."""
        self._stream.expect(rollout_id)
        try:
            await self._proxy.call(
                "import_rollout", {"records": list(records)}, timeout_s=self._control_s
            )
        except BaseException:
            self._stream.forget(rollout_id)
            raise
        return await self._stream.collect(rollout_id, timeout_s=self._control_s)

    async def _unless_ended(self, rollout_id: str, work: Coroutine[Any, Any, T]) -> T:
        """`work`'s result. Raises `_EndedByProxy`, having cancelled it, where the rollout's end
        record comes first: a proxy went while it ran, and the next one has ended it."""
        task = asyncio.ensure_future(work)
        ended = asyncio.ensure_future(self._stream.ended(rollout_id))
        try:
            await asyncio.wait({task, ended}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise _EndedByProxy
        finally:
            for each in (task, ended):
                each.cancel()
            await asyncio.gather(task, ended, return_exceptions=True)

    async def _open(
        self, assignment: Assignment, agent: Agent, key: str, gconfig: GenerationConfig
    ) -> None:
        sampling = {"max_new_tokens", "temperature", "top_p", "top_k", "override_agent"}
        params = {
            "rollout_id": assignment.rollout_id,
            "key": key,
            "group_id": assignment.group_id,
            "task_id": assignment.task_id,
            "split": assignment.split,
            "policy_version": assignment.policy_version,
            "agent": agent.name,
            "max_turns": self._openai.max_turns,
            "transcript": self.grader is not None,
            "gconfig": gconfig.model_dump(include=sampling),
        }
        try:
            opening = self._proxy.call(
                "open_rollout",
                params,
                timeout_s=self._control_s,
                idempotent=True,
                about=assignment.rollout_id,
            )
            await uninterrupted(opening)  # by a proxy that went, maybe: the next one knows
        except asyncio.CancelledError:
            failure = _our_failure(
                assignment.rollout_id, Outcome.CANCELLED, "", started_at=time.monotonic()
            )
            await self._end_cancelled(failure, word_of_the_agent(failure))
            raise

    def import_env(self, agent: Agent) -> dict[str, str]:
        """What the agent finds in its environment when it is imported. Programs are not."""
        if agent.command is not None:
            return {}
        extra, silence = {**agent.env, **self._openai.env}, self._openai.silence
        if self._openai.sandbox.start == "exec":  # each rollout's own; this one is only a trial
            return agent_environment(port=self._port, key="none", extra=extra, silence=silence)
        return import_environment(extra, silence=silence)

    async def _run_agent(self, assignment: Assignment, agent: Agent, key: str) -> RunReport:
        extra = {**agent.env, **self._openai.env}
        silence = self._openai.silence
        request = RunRequest(
            rollout_id=assignment.rollout_id,
            target=agent.target,
            pickled=agent.pickled,
            workflow_kwargs=agent.workflow_kwargs,
            data=assignment.data,
            env=agent_environment(port=self._port, key=key, extra=extra, silence=silence),
            timeout_s=self._timeout_s,
            python=agent.python,
            readable=list(agent.readable),
            import_env=self.import_env(agent),
            outputs=self._openai.sandbox.outputs,
        )
        started_at = time.monotonic()
        try:
            template = self._openai.sandbox.workspace
            workspace = workspace_of(template, assignment.data, self._base)
            request = dataclasses.replace(request, workspace=workspace)
            if agent.command is not None:
                request = self._of_program(request, agent.command)
            return await self._agents.run(request)
        except TaskError as error:
            return _our_failure(request.rollout_id, Outcome.START_FAILED, str(error), started_at)
        except asyncio.CancelledError:
            failure = _our_failure(request.rollout_id, Outcome.CANCELLED, "", started_at)
            await self._end_cancelled(failure, word_of_the_agent(failure))
            raise
        except ArealSubError as error:
            return _our_failure(request.rollout_id, Outcome.LOST, str(error), started_at)

    def _of_program(self, request: RunRequest, command: Command) -> RunRequest:
        """Raises `TaskError` where the task lacks a field."""
        variables = template_variables(request.env, str(self._base))
        filled = fill_command(command, request.data, variables)
        return dataclasses.replace(
            request,
            data={},
            argv=filled.argv,
            stdin=filled.stdin,
            files=filled.files,
            env={**request.env, **filled.env},
            reward=command.reward,
            outputs=[*request.outputs, *declared_outputs(command.reward)],
        )

    async def _judge(self, assignment: Assignment, report: RunReport) -> Verdict:
        if self.grader is None or report.outcome not in GRADED:
            return word_of_the_agent(report)
        params = {"rollout_id": report.rollout_id}
        try:
            stopped = await self._proxy.call("stop_rollout", params, timeout_s=self._control_s)
            return await self.grader.grade(assignment.data, stopped["transcript"], report)
        except asyncio.CancelledError:
            await self._end_cancelled(report, Verdict(outcome=Outcome.CANCELLED))
            raise

    async def _end_cancelled(self, report: RunReport, verdict: Verdict) -> None:
        with contextlib.suppress(ArealSubError):  # not opened, ended already, or the proxy is gone
            await uninterrupted(self._end(report, verdict))

    async def _end(self, report: RunReport, verdict: Verdict) -> None:
        self._ending.add(report.rollout_id)
        params = {
            "rollout_id": report.rollout_id,
            "outcome": verdict.outcome,
            "reward": verdict.reward,
            "turn_rewards": verdict.turn_rewards,
            "claimed_reward": verdict.claimed_reward,
            "error": verdict.error,
            "traceback": verdict.traceback,
            "stdout_tail": report.stdout_tail,
            "stderr_tail": report.stderr_tail,
            "wall_s": report.wall_s,
            "cpu_s": report.cpu_s,
            "max_rss_bytes": report.max_rss_bytes,
            "egress_refused": report.egress_refused,
            "written_bytes": report.written_bytes,
            "peak_memory_bytes": report.peak_memory_bytes,
        }
        await self._proxy.call(
            "end_rollout", params, timeout_s=self._control_s, about=report.rollout_id
        )


def _our_failure(rollout_id: str, outcome: Outcome, error: str, started_at: float) -> RunReport:
    return unmeasured_report(rollout_id, outcome, error=error, started_at=started_at)
