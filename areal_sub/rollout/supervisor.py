"""The supervisor process: runs agents in sandboxed children for the trainer. No torch, no secrets.

Started as `python -m areal_sub.rollout.supervisor SETTINGS.json` (`component`); the only module of
this package that knows the sandbox. One warm zygote per agent and environment, started on demand,
replaced after so many children, and when it has died. Served over `rpc`, to `pool` in the trainer:

    attach {port, listeners_path} → {tier, weaknesses, allow}   once, before the first agent: the
                                                                proxy
    warm  {target, pickled, python, readable, grader, import_env}  → {notes}
                                                  the agent's import error as the call's error
    run   RunRequest         → RunReport          cancelling the call kills the child
    stats {}                 → {max_children, start_timeout_s, num_running, num_waiting,
                                num_finished, num_zygotes, num_standing, num_restarts, num_renewed}

A request with `grader` runs a grader: in a zygote of its own, without the proxy's listener, without
network and without the variables that agents are let through, and in slots of its own, as many as
there are for agents.

Invariants: when this process ends, however it does, every process below it ends; when a zygote
ends, no process of its agent is left. At most `max_children` children run at once; others wait
here, and their deadline starts when they do.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import logging
import math
import os
import resource
import socket
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import areal_sub
from areal_sub.component import run_component
from areal_sub.errors import WorkflowError
from areal_sub.records import Outcome, RunReport, RunRequest
from areal_sub.rollout.carried import carry
from areal_sub.rollout.command import program_end
from areal_sub.rollout.rewards import WANTED
from areal_sub.rpc import Server
from areal_sub.waits import uninterrupted, waiting
from areal_sub.workflow import GRADER_TARGET, GRADER_VARIABLE
from sandbox import (
    ChildReport,
    Ending,
    Limits,
    PlanError,
    RenewedZygote,
    SandboxError,
    SandboxSpec,
    Zygote,
    ZygoteFailed,
)
from sandbox.folders import remove_tree
from sandbox.kernel import become_subreaper
from sandbox.layers import checks
from sandbox.layers.environ import allowed
from sandbox.plan import plan
from sandbox.probe import Probe, probe
from sandbox.reaper import kill_strangers

log = logging.getLogger(__name__)

CARRIED_PATH = "/carried"
"""Where children in foreign interpreters find what is carried to them, in a root of their own."""
MAX_TOLD = 100
ADDRESS_SPACE_FACTOR = 8
"""Runtimes reserve more than they use: Node takes 10 GiB of address space for its first `fetch`."""

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
            terminals=sandbox["max_terminals"],
            workspace_bytes=sandbox["max_workspace_bytes"],
            outputs_bytes=sandbox["max_outputs_bytes"],
        ),
    )


def make_report(request: RunRequest, child: ChildReport) -> RunReport:
    outcome, value, error = OUTCOMES[child.ending], child.value, child.error
    if request.argv and child.ending is Ending.EXITED:
        outcome, value, error = program_end(
            request.reward,
            child.exit_code or 0,
            child.stdout_tail,
            child.stderr_tail,
            child.outputs,
        )
    elif child.ending is Ending.BAD_RESULT:
        error = f"{error}: {WANTED}"
    return RunReport(
        rollout_id=request.rollout_id,
        outcome=outcome,
        result=value,
        error=error,
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
        peak_memory_bytes=child.peak_memory_bytes,
    )


class _ProxyGone(Exception):
    """The proxy went, and a child's listener with it."""


@dataclass(frozen=True, slots=True)
class _Recipe:
    """What makes a zygote: an agent, in an environment. Neither target nor pickled: programs."""

    target: str
    pickled: bytes
    python: str
    readable: tuple[str, ...]
    grader: bool  # one object may be agent and grader; a zygote is never both
    env: tuple[tuple[str, str], ...]  # what its import finds

    def __str__(self) -> str:
        name = self.target or ("(pickled)" if self.pickled else "(programs)")
        name = f"grader {name}" if self.grader else name
        return f"{name} in {self.python}" if self.python else name


class Supervisor:
    """The zygotes, by agent and environment, and the slots of the children."""

    def __init__(
        self,
        spec: SandboxSpec,
        probe: Probe,
        *,
        work_dir: Path,
        python: str,
        python_path: list[str],
        foreign_path: list[str],
        carried: Path,
        max_children: int,
        start_timeout_s: float,
        grader_spec: SandboxSpec,
        start: str = "fork",
        renew_after: int,
        reserve: int = 0,
        allow: Iterable[str] = (),
    ) -> None:
        """`python_path` is for agents in this process's own interpreter, `foreign_path` for those
        in another, which also get `carried`."""
        self._spec = spec
        self._grader_spec = grader_spec
        self._allow = tuple(allow)
        self._told: set[tuple[str, str]] = set()  # (agent, host and port) that the log names
        self._reserve = reserve
        self._to_proxy: socket.socket | None = None
        self._listeners_path = ""
        self._probe = probe
        self._work_dir = work_dir
        self._python = python
        self._python_path = python_path
        self._foreign_path = foreign_path
        self._carried = carried
        self._start_timeout_s = start_timeout_s
        self._start_by = start
        self._renew_after = renew_after
        self._zygotes: dict[_Recipe, RenewedZygote] = {}
        self._max_children = max_children
        self._slots = asyncio.Semaphore(max_children)
        self._grader_slots = asyncio.Semaphore(max_children)
        self._watching: set[asyncio.Task[None]] = set()
        self._num_started = 0
        self._num_running = 0
        self._num_waiting = 0
        self._num_finished = 0

    async def attach(self, params: dict[str, Any]) -> dict[str, Any]:
        """Raises `WorkflowError` where the tier is not to be had, `OSError` where the proxy does
        not take listeners."""
        self._listeners_path = params["listeners_path"]
        # Where the proxy is being started again just now, the first listener finds the new one.
        with contextlib.suppress(ConnectionRefusedError, FileNotFoundError):
            self._connect_to_proxy()
        try:
            self._spec = dataclasses.replace(self._spec, port=params["port"], allow=self._allow)
            made = plan(self._spec, self._probe)
            if made.tier != "process":  # where what is used counts, not only what is reserved
                limits = self._spec.limits
                reserved = ADDRESS_SPACE_FACTOR * limits.total_memory_bytes
                limits = dataclasses.replace(limits, memory_bytes=reserved)
                self._spec = dataclasses.replace(self._spec, limits=limits)
        except SandboxError as error:
            raise WorkflowError(f"rollout.openai.sandbox: {error}") from None
        return {
            "tier": made.tier,
            "weaknesses": list(made.weaknesses),
            "allow": list(made.allow),
        }

    async def warm(self, params: dict[str, Any]) -> dict[str, Any]:
        try:
            zygote = await self._zygote(_recipe(params)).warm()
        except ZygoteFailed as error:
            text = f"{error}\n{error.traceback}" if error.traceback else str(error)
            raise WorkflowError(text.rstrip()) from None
        except SandboxError as error:
            raise WorkflowError(str(error)) from None
        return {"notes": zygote.notes}

    async def run(self, params: dict[str, Any]) -> dict[str, Any]:
        request = RunRequest.from_map(params)
        slots = self._grader_slots if request.grader else self._slots
        self._num_waiting += 1
        try:
            with waiting("a slot for a child", math.inf, request.rollout_id):
                await slots.acquire()
        finally:
            self._num_waiting -= 1
        self._num_running += 1
        try:
            with waiting("its agent, in a child", request.timeout_s, request.rollout_id):
                child = await self._run_child(request, _recipe(params))
        finally:
            self._num_running -= 1
            self._num_finished += 1
            slots.release()
        self._log_refused(str(_recipe(params)), child.egress_refused)
        return make_report(request, child).to_map()

    def _log_refused(self, agent: str, refused: Iterable[str]) -> None:
        """Each once, and a bounded number: what the agent wants may need to be allowed."""
        for wanted in refused:
            if (agent, wanted) not in self._told and len(self._told) < MAX_TOLD:
                self._told.add((agent, wanted))
                log.warning("%s wants %s, not in sandbox.network.allow", agent, wanted)

    async def stats(self, _params: dict[str, Any]) -> dict[str, float]:
        zygotes = self._zygotes.values()
        num_renewed = sum(each.num_renewed for each in zygotes)
        return {
            "max_children": self._max_children,
            "start_timeout_s": self._start_timeout_s,
            "num_running": self._num_running,
            "num_waiting": self._num_waiting,
            "num_finished": self._num_finished,
            "num_zygotes": sum(each.is_alive for each in zygotes),
            "num_standing": sum(each.num_standing for each in zygotes),
            "num_restarts": self._num_started - len(zygotes) - num_renewed,
            "num_renewed": num_renewed,
        }

    async def close(self) -> None:
        """End every zygote, and with it every child."""
        await asyncio.gather(*(zygote.close() for zygote in self._zygotes.values()))

    async def _run_child(self, request: RunRequest, recipe: _Recipe) -> ChildReport:
        on_listener = partial(self._hand_over, request.rollout_id)
        try:
            async with self._zygote(recipe).lend() as zygote:
                if request.argv:
                    return await zygote.execute(
                        request.argv,
                        env=request.env,
                        stdin=request.stdin,
                        files=request.files,
                        wall_s=request.timeout_s,
                        workspace=request.workspace or None,
                        outputs=request.outputs,
                        on_listener=on_listener,
                    )
                return await zygote.run(
                    request.data,
                    kwargs=request.workflow_kwargs,
                    env=request.env,
                    wall_s=request.timeout_s,
                    workspace=request.workspace or None,
                    outputs=request.outputs,
                    on_listener=on_listener,
                )
        except ZygoteFailed as error:
            return ChildReport(Ending.SETUP_FAILED, error=str(error), traceback=error.traceback)
        except _ProxyGone as error:
            return ChildReport(Ending.LOST, error=str(error))
        except (SandboxError, OSError, TypeError, ValueError) as error:
            return ChildReport(Ending.SETUP_FAILED, error=f"{type(error).__name__}: {error}")

    async def _hand_over(self, rollout_id: str, listener: int) -> None:
        """The listener in the child's network is the proxy's from here on."""
        if not self._listeners_path:  # there is no proxy
            return
        message = [rollout_id.encode()]
        try:
            # Small, and read at once: this does not wait.
            socket.send_fds(self._to_proxy or self._connect_to_proxy(), message, [listener])
        except OSError:  # another process of the proxy has taken the path over, or will
            try:
                socket.send_fds(self._connect_to_proxy(), message, [listener])
            except OSError as error:
                raise _ProxyGone(f"the proxy does not take listeners: {error}") from None

    def _connect_to_proxy(self) -> socket.socket:
        if self._to_proxy is not None:
            self._to_proxy.close()
            self._to_proxy = None
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(self._listeners_path)
        except OSError:
            connection.close()
            raise
        self._to_proxy = connection
        return connection

    def _zygote(self, recipe: _Recipe) -> RenewedZygote:
        if recipe not in self._zygotes:
            self._zygotes[recipe] = RenewedZygote(
                partial(self._start, recipe), renew_after=self._renew_after, label=str(recipe)
            )
        return self._zygotes[recipe]

    async def _start(self, recipe: _Recipe) -> Zygote:
        self._num_started += 1
        python = recipe.python or self._python
        own = python == sys.executable
        spec, target = self._spec, recipe.target
        if recipe.grader:
            named = {**self._grader_spec.env, GRADER_VARIABLE: target}
            spec, target = dataclasses.replace(self._grader_spec, env=named), GRADER_TARGET
        python_path = self._python_path
        if not own:
            spec, shown = self._with_carried(spec)
            python_path = [*self._foreign_path, shown]
        zygote = await Zygote.start(
            dataclasses.replace(spec, readable=(*spec.readable, *recipe.readable)),
            self._probe,
            folder=self._work_dir / f"zygote-{self._num_started}",
            target=target,
            pickled=recipe.pickled,
            python=python,
            python_path=python_path,
            env=dict(recipe.env),
            start=self._start_by,
            reserve=self._reserve,
            timeout_s=self._start_timeout_s,
        )
        for note in zygote.notes:
            log.warning("agent %s: %s", recipe, note)
        watch = asyncio.ensure_future(self._sweep_after(zygote, recipe))
        self._watching.add(watch)
        watch.add_done_callback(self._watching.discard)
        return zygote

    def _with_carried(self, spec: SandboxSpec) -> tuple[SandboxSpec, str]:
        """The spec, and where children find what is carried: at a path of its own, in tiers that
        have such paths. At the one that it has, a root would have to show a part of /tmp, and could
        not give children a /tmp of their own to write to."""
        elsewhere = dataclasses.replace(
            spec, mounts={**spec.mounts, CARRIED_PATH: str(self._carried)}
        )
        try:
            plan(elsewhere, self._probe)
        except PlanError:
            return spec, str(self._carried)
        return elsewhere, CARRIED_PATH

    async def _sweep_after(self, zygote: Zygote, recipe: _Recipe) -> None:
        """Where an agent has killed even its guardian, what is left of it is our child now."""
        await zygote.gone()
        log.info("a zygote of %s ended", recipe)
        # The guardians of those that are being started are not known before that.
        while starting := [each for each in self._zygotes.values() if each.is_starting]:
            await asyncio.gather(*(each.started() for each in starting))
        ours = {pid for each in self._zygotes.values() for pid in each.pids}
        try:
            kill_strangers(ours)
        except TimeoutError as error:
            log.error("after the end of %s: %s", recipe, error)


def _recipe(params: Mapping[str, Any]) -> _Recipe:
    return _Recipe(
        params["target"],
        params["pickled"],
        params["python"],
        tuple(params["readable"]),
        params["grader"],
        tuple(sorted(params["import_env"].items())),
    )


async def main(settings: dict[str, Any]) -> None:
    """Settings: `socket_path`, `work_dir` (ours alone, emptied), `python_path`, `env_passthrough`,
    `hidden` (folders that children must not read),
    `max_children`, `sandbox` (fields of `SandboxConfig`); optional: `start_timeout_s`, `python`
    (the interpreter of the agents), `grader_hidden` and `grader_memory_bytes` (as `hidden` and
    `sandbox.max_memory_bytes`, which are their defaults, for graders)."""
    become_subreaper()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # four for each child
    work_dir = settings["work_dir"]
    remove_tree(work_dir)  # a killed predecessor's
    os.makedirs(work_dir, 0o700)  # noqa: PTH103 (nothing else runs in this loop yet)
    # Agents may use this package's `AgentWorkflow`, wherever it is installed; those in our own
    # interpreter also what is installed beside it.
    own_path = str(Path(areal_sub.__file__).parents[1])
    carried = Path(work_dir, "carried")
    carry(carried)
    sandbox, hidden = settings["sandbox"], settings.get("hidden", [])
    memory_bytes = settings.get("grader_memory_bytes", sandbox["max_memory_bytes"])
    supervisor = Supervisor(
        make_spec(sandbox, allowed(os.environ, settings["env_passthrough"]), hidden),
        probe(checks(sandbox["tier"])),
        grader_spec=make_spec(
            {**sandbox, "max_memory_bytes": memory_bytes},
            allowed(os.environ),
            settings.get("grader_hidden", hidden),
        ),
        work_dir=Path(work_dir),
        python=settings.get("python", sys.executable),
        python_path=[*settings["python_path"], own_path],
        foreign_path=settings["python_path"],
        carried=carried,
        max_children=settings["max_children"],
        start_timeout_s=settings.get("start_timeout_s", 120.0),
        start=settings["sandbox"]["start"],
        renew_after=settings["sandbox"]["recycle_after"],
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
    gc.collect()
    gc.freeze()  # no collection looks at it again: what comes from here on is small
    try:
        await asyncio.Event().wait()
    finally:
        # The lifeline and SIGTERM may both come, in the middle of it.
        await uninterrupted(_end(server, supervisor, work_dir))


async def _end(server: Server, supervisor: Supervisor, work_dir: str) -> None:
    await server.close()
    await supervisor.close()
    with contextlib.suppress(OSError):
        remove_tree(work_dir)


if __name__ == "__main__":
    run_component("supervisor", main)
