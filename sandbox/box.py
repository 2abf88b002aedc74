"""The public face: `Sandbox` to await, `BlockingSandbox` for everyone else.

    async with Sandbox(SandboxSpec(), target="pkg.mod:agent") as box:
        report = await box.run({"question": "..."})

    with BlockingSandbox() as box:
        report = box.execute(["node", "agent.js"])

With a target, children run a Python callable that was imported once, in a sealed zygote; without
one they execute programs. Either way each child is fresh, and gone when its report is there.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from .handle import Zygote
from .layers import checks
from .probe import Probe, probe
from .report import ChildReport
from .run import OutputSink
from .spec import SandboxSpec


class Sandbox:
    """One environment for children, open between `async with` and its end.

    `python` runs the target, with `python_path` in front of its import path; with `start="exec"`
    in a fresh interpreter each time. `reserve` sealed children stand ready. `probed` saves asking
    the kernel again. Entering raises `PlanError` where this machine does not give the spec's tier,
    and `ZygoteFailed` where the target cannot be imported.
    """

    def __init__(
        self,
        spec: SandboxSpec | None = None,
        *,
        target: str = "",
        python: str = sys.executable,
        python_path: Sequence[str] = (),
        start: str = "fork",
        reserve: int = 0,
        start_timeout_s: float = 120.0,
        probed: Probe | None = None,
    ) -> None:
        self._spec = spec or SandboxSpec()
        self._target = target
        self._python = python
        self._python_path = [os.path.abspath(path) for path in python_path]
        self._start = start
        self._reserve = reserve
        self._start_timeout_s = start_timeout_s
        self._probed = probed
        self._folder: Path | None = None
        self._zygote: Zygote | None = None

    async def __aenter__(self) -> Sandbox:
        probed = self._probed or probe(checks(self._spec.tier))
        self._folder = Path(tempfile.mkdtemp(prefix="sandbox-"))
        try:
            self._zygote = await Zygote.start(
                self._spec,
                probed,
                folder=self._folder / "zygote",
                target=self._target,
                python=self._python,
                python_path=self._python_path,
                start=self._start,
                reserve=self._reserve,
                timeout_s=self._start_timeout_s,
            )
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._zygote is not None and self._folder is not None
        await self._zygote.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def zygote(self) -> Zygote:
        if self._zygote is None:
            raise RuntimeError("the sandbox is not open: use it as a context manager")
        return self._zygote

    async def run(
        self,
        data: Any = None,
        *,
        kwargs: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        wall_s: float | None = None,
        workspace: str | os.PathLike[str] | None = None,
        outputs: Sequence[str] = (),
    ) -> ChildReport:
        """Call the target with `data` (JSON types) in a fresh child: see `Zygote.run`."""
        return await self.zygote.run(
            data, kwargs=kwargs, env=env, wall_s=wall_s, workspace=workspace, outputs=outputs
        )

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
        on_output: OutputSink | None = None,
    ) -> ChildReport:
        """Execute a program in a fresh child: see `Zygote.execute`."""
        return await self.zygote.execute(
            argv,
            env=env,
            stdin=stdin,
            files=files,
            wall_s=wall_s,
            workspace=workspace,
            outputs=outputs,
            on_output=on_output,
        )


class BlockingSandbox:
    """`Sandbox` for code without an event loop; the same arguments and methods."""

    def __init__(self, spec: SandboxSpec | None = None, **options: Any) -> None:
        self._sandbox = Sandbox(spec, **options)
        self._runner = asyncio.Runner()

    def __enter__(self) -> BlockingSandbox:
        try:
            self._runner.run(self._sandbox.__aenter__())
        except BaseException:
            self._runner.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._runner.run(self._sandbox.__aexit__(kind, error, traceback))
        finally:
            self._runner.close()

    @property
    def zygote(self) -> Zygote:
        return self._sandbox.zygote

    def run(self, data: Any = None, **options: Any) -> ChildReport:
        return self._runner.run(self._sandbox.run(data, **options))

    def execute(self, argv: Sequence[str], **options: Any) -> ChildReport:
        return self._runner.run(self._sandbox.execute(argv, **options))
