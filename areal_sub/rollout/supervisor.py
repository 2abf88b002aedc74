"""The supervisor process: runs agents in sandboxed children for the trainer. No torch, no secrets.

Started as `python -m areal_sub.rollout.supervisor SETTINGS.json` (`component`); the only module of
this package that knows the sandbox. One warm zygote per agent, started on demand and again when it
died. Served over `rpc`, to `pool` in the trainer:

    attach {port, listeners_path} → {tier, weaknesses, allow}   once, before the first agent: the
                                                                proxy
    warm  {target, pickled}  → {notes}            the agent's import error as the call's error
    run   RunRequest         → RunReport          cancelling the call kills the child
    stats {}                 → {max_children, start_timeout_s, num_running, num_waiting,
                                num_finished, num_zygotes, num_restarts}

Invariants: when this process ends, however it does, every process below it ends; when a zygote
ends, no process of its agent is left. At most `max_children` children run at once; others wait
here, and their deadline starts when they do.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import os
import resource
import socket
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import areal_sub
from areal_sub.component import run_component
from areal_sub.errors import WorkflowError
from areal_sub.records import Outcome, RunReport, RunRequest
from areal_sub.rpc import Server
from sandbox import ChildReport, Ending, Limits, SandboxError, SandboxSpec, Zygote, ZygoteFailed
from sandbox.folders import remove_tree
from sandbox.kernel import become_subreaper
from sandbox.layers import checks
from sandbox.layers.environ import allowed
from sandbox.plan import plan
from sandbox.probe import Probe, probe
from sandbox.reaper import kill_strangers

log = logging.getLogger(__name__)

MAX_TOLD = 100

OUTCOMES: Mapping[Ending, Outcome] = {
    Ending.RETURNED: Outcome.COMPLETED,
    Ending.RAISED: Outcome.EXCEPTION,
    Ending.EXITED: Outcome.EXITED,
    Ending.SIGNALED: Outcome.KILLED,
    Ending.TIMEOUT: Outcome.TIMEOUT,
    Ending.OUTPUT_LIMIT: Outcome.OUTPUT_LIMIT,
    Ending.RESULT_LIMIT: Outcome.RESULT_LIMIT,
    Ending.MEMORY_LIMIT: Outcome.MEMORY_LIMIT,
    Ending.CPU_LIMIT: Outcome.CPU_LIMIT,
    Ending.BAD_RESULT: Outcome.INVALID_RESULT,
    Ending.SETUP_FAILED: Outcome.START_FAILED,
    Ending.STOPPED: Outcome.CANCELLED,
    Ending.LOST: Outcome.LOST,
}


def supervisor_env(environ: Mapping[str, str], passthrough: Iterable[str] = ()) -> dict[str, str]:
    """The environment to start the supervisor with: children may look at their parents' one."""
    kept = allowed(environ, passthrough)
    return kept | {name: environ[name] for name in ("AREAL_SUB_LOG",) if name in environ}


def make_spec(
    sandbox: Mapping[str, Any], env: Mapping[str, str], hidden: Iterable[str] = ()
) -> SandboxSpec:
    """The sandbox's spec from the fields of `SandboxConfig`."""
    return SandboxSpec(
        tier=sandbox["tier"],
        cgroups=sandbox["cgroups"],
        env=env,
        readable=tuple(str(Path(path).resolve()) for path in sandbox["readable"]),
        hidden=tuple(hidden),
        mounts={inside: str(Path(path).resolve()) for inside, path in sandbox["mounts"].items()},
        limits=Limits(
            cpu_s=sandbox["max_cpu_s"],
            memory_bytes=sandbox["max_memory_bytes"],
            open_files=sandbox["max_open_files"],
            file_bytes=sandbox["max_file_bytes"],
            output_bytes=sandbox["max_output_bytes"],
            result_bytes=sandbox["max_result_bytes"],
            total_memory_bytes=sandbox["max_memory_bytes"],
            total_cpu_s=sandbox["max_cpu_s"],
            processes=sandbox["max_processes"],
            scratch_bytes=sandbox["max_scratch_bytes"],
            scratch_files=sandbox["max_scratch_files"],
            workspace_bytes=sandbox["max_workspace_bytes"],
            outputs_bytes=sandbox["max_outputs_bytes"],
        ),
    )


def make_report(rollout_id: str, child: ChildReport) -> RunReport:
    return RunReport(
        rollout_id=rollout_id,
        outcome=OUTCOMES[child.ending],
        result=child.value,
        error=child.error,
        traceback=child.traceback,
        stdout_tail=child.stdout_tail,
        stderr_tail=child.stderr_tail,
        exit_code=child.exit_code,
        signal=child.signal,
        wall_s=child.wall_s,
        cpu_s=child.cpu_s,
        max_rss_bytes=child.max_rss_bytes,
        num_killed=child.num_killed,
        egress_refused=dict(child.egress_refused),
        written_bytes=child.written_bytes,
        outputs=dict(child.outputs),
        outputs_refused=[list(each) for each in child.outputs_refused],
        outputs_missing=list(child.outputs_missing),
    )


class Supervisor:
    """The zygotes, by agent, and the slots of the children."""

    def __init__(
        self,
        spec: SandboxSpec,
        probe: Probe,
        *,
        work_dir: Path,
        python: str,
        python_path: list[str],
        max_children: int,
        start_timeout_s: float,
        reserve: int = 0,
        allow: Iterable[str] = (),
    ) -> None:
        self._spec = spec
        self._allow = tuple(allow)
        self._told: set[tuple[str, str]] = set()  # (agent, host and port) that the log names
        self._reserve = reserve
        self._to_proxy: socket.socket | None = None
        self._probe = probe
        self._work_dir = work_dir
        self._python = python
        self._python_path = python_path
        self._start_timeout_s = start_timeout_s
        self._zygotes: dict[str, asyncio.Task[Zygote]] = {}
        self._max_children = max_children
        self._slots = asyncio.Semaphore(max_children)
        self._watching: set[asyncio.Task[None]] = set()
        self._num_started = 0
        self._num_running = 0
        self._num_waiting = 0
        self._num_finished = 0

    async def attach(self, params: dict[str, Any]) -> dict[str, Any]:
        """Raises `WorkflowError` where the tier is not to be had, `OSError` where the proxy does
        not take listeners."""
        self._to_proxy = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._to_proxy.connect(params["listeners_path"])
        try:
            self._spec = dataclasses.replace(self._spec, port=params["port"], allow=self._allow)
            made = plan(self._spec, self._probe)
        except SandboxError as error:
            raise WorkflowError(f"rollout.openai.sandbox: {error}") from None
        return {
            "tier": made.tier,
            "weaknesses": list(made.weaknesses),
            "allow": list(made.allow),
        }

    async def warm(self, params: dict[str, Any]) -> dict[str, Any]:
        try:
            zygote = await self._zygote(params["target"], params["pickled"])
        except ZygoteFailed as error:
            text = f"{error}\n{error.traceback}" if error.traceback else str(error)
            raise WorkflowError(text.rstrip()) from None
        except SandboxError as error:
            raise WorkflowError(str(error)) from None
        return {"notes": zygote.notes}

    async def run(self, params: dict[str, Any]) -> dict[str, Any]:
        request = RunRequest.from_map(params)
        self._num_waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._num_waiting -= 1
        self._num_running += 1
        try:
            child = await self._run_child(request)
        finally:
            self._num_running -= 1
            self._num_finished += 1
            self._slots.release()
        self._log_refused(request.target or "(pickled)", child.egress_refused)
        return make_report(request.rollout_id, child).to_map()

    def _log_refused(self, agent: str, refused: Iterable[str]) -> None:
        """Each once, and a bounded number: what the agent wants may need to be allowed."""
        for wanted in refused:
            if (agent, wanted) not in self._told and len(self._told) < MAX_TOLD:
                self._told.add((agent, wanted))
                log.warning("%s wants %s, not in sandbox.network.allow", agent, wanted)

    async def stats(self, _params: dict[str, Any]) -> dict[str, float]:
        alive = [task for task in self._zygotes.values() if _is_alive(task)]
        return {
            "max_children": self._max_children,
            "start_timeout_s": self._start_timeout_s,
            "num_running": self._num_running,
            "num_waiting": self._num_waiting,
            "num_finished": self._num_finished,
            "num_zygotes": len(alive),
            "num_restarts": self._num_started - len(self._zygotes),
        }

    async def close(self) -> None:
        """End every zygote, and with it every child."""
        tasks = list(self._zygotes.values())
        for task in tasks:
            if not task.done():
                task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(zygote.close() for zygote in done if isinstance(zygote, Zygote)))

    async def _run_child(self, request: RunRequest) -> ChildReport:
        try:
            zygote = await self._zygote(request.target, request.pickled)
            return await zygote.run(
                request.data,
                kwargs=request.workflow_kwargs,
                env=request.env,
                wall_s=request.timeout_s,
                workspace=request.workspace or None,
                outputs=request.outputs,
                on_listener=partial(self._hand_over, request.rollout_id),
            )
        except ZygoteFailed as error:
            return ChildReport(Ending.SETUP_FAILED, error=str(error), traceback=error.traceback)
        except (SandboxError, OSError, TypeError, ValueError) as error:
            return ChildReport(Ending.SETUP_FAILED, error=f"{type(error).__name__}: {error}")

    async def _hand_over(self, rollout_id: str, listener: int) -> None:
        """The listener in the child's network is the proxy's from here on."""
        if self._to_proxy is not None:
            # Small, and read at once: this does not wait unless the proxy is gone.
            socket.send_fds(self._to_proxy, [rollout_id.encode()], [listener])

    async def _zygote(self, target: str, pickled: bytes) -> Zygote:
        """The agent's zygote, started if there is none or it died. Raises `SandboxError`."""
        key = hashlib.sha256(pickled).hexdigest() if pickled else target
        task = self._zygotes.get(key)
        if task is None or (task.done() and not _is_alive(task)):
            task = asyncio.ensure_future(self._start(target, pickled))
            self._zygotes[key] = task
        # Shielded: many may wait for one start, and one that gives up must not end it.
        return await asyncio.shield(task)

    async def _start(self, target: str, pickled: bytes) -> Zygote:
        self._num_started += 1
        zygote = await Zygote.start(
            self._spec,
            self._probe,
            folder=self._work_dir / f"zygote-{self._num_started}",
            target=target,
            pickled=pickled,
            python=self._python,
            python_path=self._python_path,
            reserve=self._reserve,
            timeout_s=self._start_timeout_s,
        )
        for note in zygote.notes:
            log.warning("agent %s: %s", target or "(pickled)", note)
        watch = asyncio.ensure_future(self._sweep_after(zygote, target))
        self._watching.add(watch)
        watch.add_done_callback(self._watching.discard)
        return zygote

    async def _sweep_after(self, zygote: Zygote, target: str) -> None:
        """Where an agent has killed even its guardian, what is left of it is our child now."""
        await zygote.gone()
        log.info("the zygote of %s ended", target or "(pickled)")
        while starting := {task for task in self._zygotes.values() if not task.done()}:
            await asyncio.wait(starting)  # their guardians are not known before that
        ours = {
            pid for task in self._zygotes.values() if _is_alive(task) for pid in task.result().pids
        }
        try:
            kill_strangers(ours)
        except TimeoutError as error:
            log.error("after the end of %s: %s", target or "(pickled)", error)


def _is_alive(task: asyncio.Task[Zygote]) -> bool:
    if not task.done() or task.cancelled() or task.exception() is not None:
        return False
    return task.result().is_alive


async def main(settings: dict[str, Any]) -> None:
    """Settings: `socket_path`, `work_dir` (ours alone, emptied), `python_path`, `env_passthrough`,
    `hidden` (folders that children must not read),
    `max_children`, `sandbox` (fields of `SandboxConfig`); optional: `start_timeout_s`, `python`
    (the interpreter of the agents)."""
    become_subreaper()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # four for each child
    work_dir = settings["work_dir"]
    remove_tree(work_dir)  # a killed predecessor's
    os.makedirs(work_dir, 0o700)  # noqa: PTH103 (nothing else runs in this loop yet)
    # Agents may use this package's `AgentWorkflow`, wherever it is installed.
    own_path = str(Path(areal_sub.__file__).parents[1])
    supervisor = Supervisor(
        make_spec(
            settings["sandbox"],
            allowed(os.environ, settings["env_passthrough"]),
            settings.get("hidden", []),
        ),
        probe(checks(settings["sandbox"]["tier"])),
        work_dir=Path(work_dir),
        python=settings.get("python", sys.executable),
        python_path=[*settings["python_path"], own_path],
        max_children=settings["max_children"],
        start_timeout_s=settings.get("start_timeout_s", 120.0),
        reserve=settings["sandbox"]["reserve"],
        allow=settings["sandbox"]["network"]["allow"],
    )
    server = Server(
        Path(settings["socket_path"]),
        {
            "attach": supervisor.attach,
            "warm": supervisor.warm,
            "run": supervisor.run,
            "stats": supervisor.stats,
        },
    )
    await server.start()
    try:
        await asyncio.Event().wait()
    finally:
        ending = asyncio.ensure_future(_end(server, supervisor, work_dir))
        while not ending.done():  # the lifeline and SIGTERM may both come, in the middle of it
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(ending)


async def _end(server: Server, supervisor: Supervisor, work_dir: str) -> None:
    await server.close()
    await supervisor.close()
    with contextlib.suppress(OSError):
        remove_tree(work_dir)


if __name__ == "__main__":
    run_component("supervisor", main)
