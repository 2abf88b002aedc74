"""The caller's side of a zygote and its children, on asyncio (or uvloop).

`Zygote.start` returns when the agent is imported, `Zygote.run` when the child and everything that
descends from it is gone. No threads; each child costs four descriptors here while it runs.

Invariants: every wait has a deadline; where a child's init does not obey in time the whole zygote
is closed; closing or losing a zygote ends every child of it.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import kernel
from . import plan as plans
from .cgroups import REMOVE_TIMEOUT_S, Group, Groups, NoGroups, find, remove_all
from .egress_handle import EgressHandle, Leash
from .errors import PlanError, SpecError, StepFailed, ZygoteFailed
from .folders import remove_tree
from .launch import OF_ZYGOTES, Launched, interpreter_paths_of, launch, memory_file
from .layers import bwrap
from .outputs import make_order
from .probe import Probe
from .report import ChildReport, Ending
from .reserve import Reserve
from .run import (
    CLEANUP_TIMEOUT_S,
    KILL_TIMEOUT_S,
    READY_TIMEOUT_S,
    OutputSink,
    Pipe,
    Run,
    settle,
)
from .spec import SandboxSpec, check_env, is_text, is_whole
from .wire import MAX_READY_BYTES, one_line, text
from .workspace import Templates

MAX_NOTES = 20
"""Of a zygote."""
RETIRE_INTERVAL_S = 0.05
"""Between two attempts to remove a child's group that the last process has not quite left."""

STARTS = ("fork", "exec")
_PROGRAMS = "programs"
_NO_AGENT = {"target": "", "pickled": "", "python_path": []}
ListenerTaker = Callable[[int], Awaitable[None]]


class Zygote:
    """One agent, imported and warm. Make it with `await Zygote.start(...)`."""

    def __init__(
        self,
        launched: Launched,
        spec: SandboxSpec,
        made: plans.Plan,
        folder: Path,
        groups: Groups | None,
    ) -> None:
        self.spec = spec
        self.plan = made
        self.notes: list[str] = []
        """What the warm-up could not do, and whether the agent's import started threads."""
        self._folder = folder
        self._groups = groups
        self._guardian = launched.guardian
        self._channel = launched.channel
        self._lifeline = launched.lifeline
        self._loop = asyncio.get_running_loop()
        self._output = Pipe(launched.output, spec.limits.output_bytes, self._on_output)
        self._templates = Templates(spec.limits)
        self._sending = asyncio.Lock()
        self._runs: set[Run] = set()
        self._reserve = Reserve(self._new_run, self._release)
        self._num_runs = 0
        self._closed = False
        self._egress: EgressHandle | None = None
        self._fresh: dict[str, Any] | None = None
        """What each child imports by itself, where the zygote has not."""
        # What children left may take long to remove: that takes none of the threads of others, nor
        # does one removal get in the way of another.
        self._removing = concurrent.futures.ThreadPoolExecutor(1, "sandbox-removal")
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._pidfd = os.pidfd_open(self._guardian.pid)
        self._loop.add_reader(self._pidfd, self._on_gone)
        self._channel.setblocking(False)

    @classmethod
    async def start(
        cls,
        spec: SandboxSpec,
        probe: Probe,
        *,
        folder: Path,
        target: str = "",
        pickled: bytes = b"",
        python: str = sys.executable,
        python_path: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        start: str = "fork",
        reserve: int = 0,
        timeout_s: float,
    ) -> Zygote:
        """Start `python` in `folder` (made here, removed at the end) and have it import the agent.

        The agent is `target`, an import path, or `pickled`, its dill; with neither, children
        execute programs (`execute`). `reserve` sealed children are kept standing ready.
        `python_path` goes in front of the agent's import path, and can be read. `env`: variables
        that the agent's import finds; each child has only those of its own request. With
        `start="exec"` the zygote never imports the agent: each child becomes a fresh interpreter
        that does. Raises `PlanError`, and `ZygoteFailed` with the agent's traceback.
        """
        if start not in STARTS:
            raise SpecError(f"unknown start {start!r}; there are: {', '.join(STARTS)}")
        kernel.raise_open_files()
        made = plans.plan(dataclasses.replace(spec, readable=(*spec.readable, *python_path)), probe)
        interpreter = await _shown_around(made, python)
        agent = {
            "target": target,
            "pickled": base64.b64encode(pickled).decode(),
            "python_path": list(python_path),
        }
        env = env or {}
        check_env(env)
        is_fresh = start == "exec" and bool(target or pickled)
        settings = {
            **(_NO_AGENT if is_fresh else agent),
            "env": {name: value for name, value in env.items() if name not in OF_ZYGOTES},
            "plan": plans.to_json(made),
            "folder": bwrap.FOLDER if made.outer else str(folder),
        }
        home = folder / "zygote"
        _make_folders(folder, home)
        label = target or ("pickled" if pickled else _PROGRAMS)
        try:
            groups = _make_groups(made)
        except PlanError:
            _remove(folder)
            raise
        settings["groups"] = folders = groups.folders if groups is not None else []
        enter: list[int] = []
        try:
            enter = groups.zygote.enter() if groups is not None else []
            based = dataclasses.replace(spec, env=plans.environment(spec))
            launched = launch(
                based,
                settings,
                made.outer,
                python=python,
                folder=str(home),
                label=label,
                group=enter,
                interpreter=interpreter,
            )
        except OSError as error:
            _remove(folder)
            remove_all(folders)
            raise ZygoteFailed(f"cannot start {python!r}: {error}") from None
        finally:
            for fd in enter:
                os.close(fd)
        zygote = cls(launched, spec, made, folder, groups)
        try:
            async with asyncio.timeout(timeout_s):
                if made.allow:
                    zygote._egress = EgressHandle(made, zygote._cut_lifeline)
                    await zygote._egress.ready()
                await zygote._until_ready(label)
                if is_fresh:
                    zygote._fresh = {**agent, "label": label}
                    await zygote._try_import(label, env)
        except TimeoutError:
            await zygote.close()
            tail = zygote._output.tail()
            raise ZygoteFailed(f"{label!r} was not imported within {timeout_s:g} s", tail) from None
        except ZygoteFailed as error:
            await zygote.close()
            if not made.root or os.getuid() != 0:
                raise
            raise ZygoteFailed(
                f"{error}{_closed_to_others(python_path)}", error.traceback
            ) from None
        except BaseException:
            await zygote.close()
            raise
        zygote._reserve.begin(reserve)
        return zygote

    @property
    def is_alive(self) -> bool:
        return not self._closed and not self._gone.done()

    @property
    def guardian_pid(self) -> int:
        return self._guardian.pid

    @property
    def pids(self) -> set[int]:
        """The children of this process that belong to the zygote."""
        return {self._guardian.pid} | ({self._egress.pid} if self._egress is not None else set())

    @property
    def num_standing(self) -> int:
        """Children in the reserve, the one that is being sealed for it among them."""
        return len(self._reserve)

    async def run(
        self,
        data: Any,
        *,
        kwargs: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        wall_s: float | None = None,
        workspace: str | os.PathLike[str] | None = None,
        outputs: Sequence[str] = (),
        on_listener: ListenerTaker | None = None,
    ) -> ChildReport:
        """Run the agent once, in a fresh child, with `data` (JSON types).

        `workspace` is a folder whose content the child finds in its working directory, as its own.
        `outputs` are paths in there, of files or folders, with `*`, `?` and `[...]` in their parts:
        what of it is there at the child's end, however it comes, is in the report.
        `on_listener` is awaited before the agent runs, with the descriptor of the listener in the
        child's own network, in tiers where it has one; it is closed afterwards. Returns when all
        its processes are gone. Cancelling kills the child first. Raises `SpecError` for an invalid
        `env`, `workspace` or `outputs`, `TypeError` or `ValueError` for data that is not JSON.
        """
        request = {"data": data, "kwargs": dict(kwargs or {})}
        if self._fresh is not None:
            request |= {**self._fresh, "only_import": False}
        return await self._run(request, env, wall_s, workspace, outputs, on_listener, None)

    async def execute(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdin: str = "",
        files: Mapping[str, str] | None = None,
        wall_s: float | None = None,
        workspace: str | os.PathLike[str] | None = None,
        outputs: Sequence[str] = (),
        on_listener: ListenerTaker | None = None,
        on_output: OutputSink | None = None,
    ) -> ChildReport:
        """Execute a program in a fresh child, where the zygote was started without a target.

        `files` are written before: path in the working directory, or `~/...` in HOME, to content.
        Its end is EXITED, with its code. `on_output` gets what it writes as it comes: 1 or 2, and
        the bytes; what it raises ends the child, and is raised here. Raises `SpecError` for an
        invalid `argv`, `files`, `env`, `workspace` or `outputs`.
        """
        if not argv or not argv[0] or not all(map(is_text, argv)):
            raise SpecError(f"argv must be a program and its words, without NUL, not {argv!r}")
        if not is_whole(stdin):
            raise SpecError("stdin is no text: it has half of a character in it")
        for path, content in (files or {}).items():
            inside = path[2:] if path.startswith("~/") else path
            if not inside or inside.startswith("/") or not is_text(path) or ".." in path.split("/"):
                raise SpecError(f"files: {path!r} is neither below the working directory nor ~/")
            if not is_whole(content):
                raise SpecError(f"files: what {path!r} holds has half of a character in it")
        request = {"argv": list(argv), "stdin": stdin, "files": dict(files or {})}
        return await self._run(request, env, wall_s, workspace, outputs, on_listener, on_output)

    async def _run(
        self,
        request: dict[str, Any],
        env: Mapping[str, str] | None,
        wall_s: float | None,
        workspace: str | os.PathLike[str] | None,
        outputs: Sequence[str],
        on_listener: ListenerTaker | None,
        on_output: OutputSink | None,
    ) -> ChildReport:
        check_env(env or {})
        limits = self.spec.limits
        limit_s = limits.wall_s if wall_s is None else wall_s
        if not limit_s > 0:
            raise SpecError(f"wall_s must be positive, not {wall_s!r}")
        try:
            encoded = json.dumps({**request, "env": dict(env or {})}).encode()
        except RecursionError:
            raise ValueError("the data is nested too deeply") from None
        order = None
        if outputs:
            order = make_order(outputs, limits.outputs_bytes, limits.outputs_files)
        template = None
        if workspace is not None:
            template = await asyncio.to_thread(self._templates.packed, os.fspath(workspace))
        request_fd = memory_file("request", encoded)
        run: Run | None = None
        leash: Leash | None = None
        try:
            run = self._reserve.take() or await self._new_run()
            await run.ready()
            if run.listeners:  # in the order of the plan's ports: the caller's, the egress proxy's
                if self.spec.port is not None and on_listener is not None:
                    await on_listener(run.listeners[0])
                if self._egress is not None:
                    leash = await self._hand_over(run)
            request_fds = [request_fd] if template is None else [request_fd, template.fd]
            here = self.plan.tier == "process"  # where an init is the agent's zygote's fork
            run.begin(request_fds, limit_s, on_output, order, collect_here=here)
            self._reserve.fill_later()
            report = await run.ended()
            if leash is not None:
                report = dataclasses.replace(report, egress_refused=await leash.end())
            return report
        except StepFailed as failure:
            return ChildReport(Ending.SETUP_FAILED, error=str(failure))
        finally:
            if leash is not None:
                leash.close()
            os.close(request_fd)
            if run is not None:
                await self._clear(run)

    async def _clear(self, run: Run) -> None:
        self._release(run)
        # It was kept for its outputs, or its init was killed before it came to that. (What is left
        # of a zygote that ends is removed as a whole.)
        if run.is_over and self.is_alive and run.folder.exists():
            removal = self._loop.run_in_executor(self._removing, _remove, run.folder)
            await asyncio.wait({removal}, timeout=CLEANUP_TIMEOUT_S)

    async def _hand_over(self, run: Run) -> Leash | None:
        """A child never runs without the way out that it was promised: None ends it."""
        assert self._egress is not None
        try:
            return await self._egress.take(run.listeners[-1])
        except OSError:  # the proxy has ended, or hangs; the zygote goes with it
            self._egress.kill()
            run.stop(Ending.LOST)
            return None

    async def _new_run(self) -> Run:
        """A child that was ordered, and is being sealed. Raises `StepFailed`."""
        self._num_runs += 1
        folder = self._folder / str(self._num_runs)
        group, enter = None, []
        if self._groups is not None:
            try:
                group = self._groups.new()
                enter = group.enter()
            except OSError as error:
                raise StepFailed("cgroups", f"no group can be made: {error}") from None
        num_listeners = self.plan.num_listeners
        run = Run(self.spec.limits, folder, self._on_disobeyed, group, enter, num_listeners)
        self._runs.add(run)
        try:
            await self._order(run)
        except BaseException:  # cancelled, while others' orders wait before it
            self._release(run)
            raise
        return run

    def _release(self, run: Run) -> None:
        self._runs.discard(run)
        run.release()
        if run.group is not None:  # not now: nobody waits for it, but somebody for the report
            deadline = self._loop.time() + REMOVE_TIMEOUT_S
            self._loop.call_soon(self._retire, run.group, deadline)

    def _retire(self, group: Group, deadline: float) -> None:
        """Remove the group of a child whose processes are gone, or will be with the zygote."""
        if group.remove() or not self.is_alive:
            return
        if self._loop.time() > deadline:  # it is not the child's: the zygote has put it there
            self._cut_lifeline()
        else:
            self._loop.call_later(RETIRE_INTERVAL_S, self._retire, group, deadline)

    async def close(self, timeout_s: float = 10.0) -> None:
        """End everything: children, zygote, guardian. Never raises; idempotent."""
        self._closed = True
        self._reserve.close()
        for run in self._runs:
            run.stop(Ending.LOST)
        self._cut_lifeline()
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(self._gone)
        except TimeoutError:
            self._guardian.kill()  # stopped by the agent, say; the zygote dies with it
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await asyncio.shield(self._gone)
        if self._egress is not None:
            await self._egress.gone()

    async def gone(self) -> None:
        """Returns once the guardian, so everything below it, has ended."""
        await asyncio.shield(self._gone)

    async def _until_ready(self, label: str) -> None:
        try:
            raw = await self._loop.sock_recv(self._channel, MAX_READY_BYTES)
        except OSError:
            raw = b""
        message = _object(raw)
        if message.get("ready") is True:
            notes = message.get("notes")
            notes = notes if isinstance(notes, list) else []  # the agent's import may have said it
            self.notes = [one_line(note) for note in notes[:MAX_NOTES]]
            if message.get("num_threads", 1) != 1:
                self.notes.append(
                    f"importing {label!r} started threads, which its children do not have, and may "
                    "wait for: with start=exec each imports it anew"
                )
            return
        if "error" in message:
            raise ZygoteFailed(
                f"cannot import the agent {label!r}: {one_line(message['error'])}",
                text(message.get("traceback")),
            )
        await self.close()
        tail = self._output.tail()
        last = tail.strip().rpartition("\n")[2][:300]
        what = "starts programs" if label == _PROGRAMS else f"imported {label!r}"
        raise ZygoteFailed(
            f"the process that {what} ended with code {self._guardian.returncode}"
            + (f"; its last words: {last}" if last else ""),
            tail,
        )

    async def _try_import(self, label: str, env: Mapping[str, str]) -> None:
        """One child that only imports the agent. Raises `ZygoteFailed` where it cannot."""
        assert self._fresh is not None
        request = {**self._fresh, "only_import": True}
        report = await self._run(request, env, None, None, (), None, None)
        if report.ending is Ending.RAISED:
            raise ZygoteFailed(report.error, report.traceback)
        if report.ending is not Ending.RETURNED:
            tail = report.stderr_tail
            raise ZygoteFailed(f"importing {label!r} in a child ended it: {report.error}", tail)

    async def _order(self, run: Run) -> None:
        """Send the order for a child. A zygote that is gone ends the run as LOST."""
        order = json.dumps({"folder": str(run.folder)}).encode()
        try:
            fds = [run.far_control.fileno(), run.far_request.fileno(), *run.far_fds]
            async with self._sending:
                while self.is_alive:
                    try:
                        socket.send_fds(self._channel, [order], fds)
                        return
                    except BlockingIOError:
                        async with asyncio.timeout(READY_TIMEOUT_S):
                            await self._writable()
        except (OSError, TimeoutError):
            pass
        finally:
            run.close_far_ends()
        run.stop(Ending.LOST)

    async def _writable(self) -> None:
        ready = self._loop.create_future()
        self._loop.add_writer(self._channel, settle, ready)
        try:
            await asyncio.wait({ready, self._gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._loop.remove_writer(self._channel)

    def _on_output(self) -> None:
        if self._output.num_bytes > self.spec.limits.output_bytes:
            self._cut_lifeline()

    def _cut_lifeline(self) -> None:
        """The guardian then kills everything below it, and ends."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._lifeline.shutdown(socket.SHUT_RDWR)

    def _on_disobeyed(self) -> None:
        """An init does not answer: its guardian is what is left to end it."""
        self._cut_lifeline()
        self._loop.call_later(KILL_TIMEOUT_S, self._guardian.kill)

    def _on_gone(self) -> None:
        self._closed = True
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._guardian.wait(timeout=0)
        self._output.drain()
        self._output.close()
        with contextlib.suppress(OSError):  # whoever waits for it still does: it hears the end
            self._channel.shutdown(socket.SHUT_RDWR)
        self._lifeline.close()
        if self._egress is not None:
            self._egress.end()
        self._reserve.close()
        for run in self._runs:  # an init that outlived its guardian still obeys this
            run.stop(Ending.LOST)
        removal = self._loop.run_in_executor(self._removing, self._remove_all)
        self._removing.shutdown(wait=False)
        removal.add_done_callback(lambda _: self._on_removed())

    def _remove_all(self) -> None:
        _remove(self._folder)
        if self._groups is not None:  # the guardian has done it, unless it was killed
            remove_all(self._groups.folders)

    def _on_removed(self) -> None:
        settle(self._gone)
        self._channel.close()


async def _shown_around(made: plans.Plan, python: str) -> Sequence[str]:
    """What an outer tier has to show of the interpreter. Raises `ZygoteFailed`."""
    if not made.outer:
        return ()
    try:
        return await asyncio.to_thread(interpreter_paths_of, python)
    except (OSError, subprocess.SubprocessError) as error:
        raise ZygoteFailed(f"cannot start {python!r}: {error}") from None


def _make_groups(made: plans.Plan) -> Groups | None:
    """Where the plan has groups. Raises `PlanError` where they are not to be had any more."""
    zygote, child = made.group("zygote"), made.group("child")
    if zygote is None or child is None:
        return None
    try:
        return Groups(find(), zygote=zygote, child=child)
    except (NoGroups, OSError) as error:
        raise PlanError(f"cgroups: no group can be made: {error}") from None


def _closed_to_others(python_path: Sequence[str]) -> str:
    """What to say of folders that root's children cannot import from: they are another user
    outside. "" where there is none."""
    for path in python_path:
        try:
            mode = os.stat(path).st_mode
        except OSError:
            continue  # absent: not our concern
        needed = 0o005 if stat.S_ISDIR(mode) else 0o004
        if mode & needed != needed:
            return (
                f" (as root, agents run as an unprivileged user, who cannot read {path}: "
                "chmod o+rX it, or run as an ordinary user)"
            )
    return ""


def _make_folders(*folders: Path) -> None:
    for folder in folders:
        folder.mkdir(mode=0o700, parents=True)


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):  # what cannot be removed stays below the caller's folder
        remove_tree(str(folder))


def _object(raw: bytes) -> dict[str, Any]:
    try:
        message = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}
