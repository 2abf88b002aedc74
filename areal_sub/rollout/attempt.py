"""One rollout from its opening to its trajectory.

    open at the proxy → run the agent (pool or inline) → judge its result → end at the proxy
    → await the trajectory from the record stream

Whatever the agent does becomes an outcome on its end record. Only a failure of our own processes
(`PeerGone`) leaves here as an exception; a call to them that fails while they live is `LOST`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from areal_sub.config.schema import GenerationConfig, OpenAIConfig, RolloutConfig
from areal_sub.errors import ArealSubError, PeerGone, TaskError, WorkflowError
from areal_sub.records import Outcome, RunReport, RunRequest
from areal_sub.rollout.command import Command, declared_outputs, fill_command
from areal_sub.rollout.environ import agent_environment, template_variables
from areal_sub.rollout.mix import Agent
from areal_sub.rollout.rewards import judge_result
from areal_sub.rollout.workspace import workspace_of
from areal_sub.rpc import Client
from areal_sub.trajectory.stream import TrajectoryStream
from areal_sub.trajectory.tree import Trajectory

CONTROL_TIMEOUT_S = 60.0


class AgentRunner(Protocol):
    """Runs agents: `SubprocPool` or `InlineRunner`."""

    async def warm(
        self,
        target: str,
        pickled: bytes = b"",
        *,
        python: str = "",
        readable: Sequence[str] = (),
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
    ) -> None:
        self._proxy = proxy
        self._port = proxy_port
        self._stream = stream
        self._agents = agents
        self._timeout_s = config.timeout_s
        self._openai: OpenAIConfig = config.openai
        self._base = Path.cwd()  # what paths in the configuration are relative to

    async def run(
        self, assignment: Assignment, agent: Agent, gconfig: GenerationConfig
    ) -> Trajectory:
        """Raises `PeerGone` where a process of ours ended, `DeadlineExceeded` where it hangs."""
        key = secrets.token_urlsafe(24)
        self._stream.expect(assignment.rollout_id)
        try:
            await self._open(assignment, agent, key, gconfig)
            report = await self._run_agent(assignment, agent, key)
            await self._end(report)
        except BaseException:
            self._stream.forget(assignment.rollout_id)
            raise
        return await self._stream.collect(assignment.rollout_id, timeout_s=CONTROL_TIMEOUT_S)

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
            "gconfig": gconfig.model_dump(include=sampling),
        }
        await self._proxy.call("open_rollout", params, timeout_s=CONTROL_TIMEOUT_S)

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
            return _our_failure(request, Outcome.START_FAILED, str(error), started_at)
        except asyncio.CancelledError:
            await asyncio.shield(
                self._end(_our_failure(request, Outcome.CANCELLED, "", started_at))
            )
            raise
        except PeerGone:
            raise
        except ArealSubError as error:
            return _our_failure(request, Outcome.LOST, str(error), started_at)

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

    async def _end(self, report: RunReport) -> None:
        outcome, error = report.outcome, report.error
        reward: float | None = None
        turn_rewards: dict[str, float] = {}
        if outcome is Outcome.COMPLETED:
            try:
                reward, turn_rewards = judge_result(report.result)
            except WorkflowError as invalid:
                outcome, error = Outcome.INVALID_RESULT, str(invalid)
        params = {
            "rollout_id": report.rollout_id,
            "outcome": outcome,
            "reward": reward,
            "turn_rewards": turn_rewards,
            "error": error,
            "traceback": report.traceback,
            "stdout_tail": report.stdout_tail,
            "stderr_tail": report.stderr_tail,
            "wall_s": report.wall_s,
            "cpu_s": report.cpu_s,
            "max_rss_bytes": report.max_rss_bytes,
            "egress_refused": report.egress_refused,
            "written_bytes": report.written_bytes,
        }
        await self._proxy.call("end_rollout", params, timeout_s=CONTROL_TIMEOUT_S)


def _our_failure(request: RunRequest, outcome: Outcome, error: str, started_at: float) -> RunReport:
    return RunReport(
        rollout_id=request.rollout_id,
        outcome=outcome,
        result=None,
        error=error,
        traceback="",
        stdout_tail="",
        stderr_tail="",
        exit_code=None,
        signal=None,
        wall_s=time.monotonic() - started_at,
        cpu_s=0.0,
        max_rss_bytes=0,
    )
