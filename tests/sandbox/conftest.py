"""Zygotes in a bare interpreter, so that tests do not wait for SDKs to import."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox import ChildReport, Limits, SandboxSpec, Zygote
from sandbox.layers.environ import allowed
from sandbox.probe import Probe, probe

AGENTS = Path(__file__).parent / "agents"


@pytest.fixture(scope="session")
def bare_python() -> str:
    """The interpreter that the tests' environment was made from: no SDK in it."""
    return str(getattr(sys, "_base_executable", sys.executable))


@pytest.fixture(scope="session")
def probed() -> Probe:
    return probe()


class Lab:
    """A loop and a zygote that runs `acts:act`, for all tests of a module."""

    def __init__(self, folder: Path, probed: Probe, python: str, tier: str) -> None:
        self.tier = tier
        self.folder = folder
        self.probed = probed
        self.python = python
        self.runner = asyncio.Runner()
        self._zygote: Zygote | None = None
        self._numbers = itertools.count()

    def do(self, do: str, *, env: dict[str, str] | None = None, **data: Any) -> ChildReport:
        """Run one act in the shared zygote (a new one where a test has killed it)."""
        wall_s = data.pop("wall_s", 30.0)

        async def go() -> ChildReport:
            zygote = await self.zygote()
            return await zygote.run({"do": do, **data}, env=env, wall_s=wall_s)

        return self.runner.run(go())

    async def zygote(self) -> Zygote:
        if self._zygote is None or not self._zygote.is_alive:
            self._zygote = await self.start("acts:act", limits=Limits(output_bytes=2**20))
        return self._zygote

    async def start(self, target: str, **options: Any) -> Zygote:
        limits = options.pop("limits", Limits())
        timeout_s = options.pop("timeout_s", 30.0)
        options.setdefault("python", self.python)
        options.setdefault("python_path", [str(AGENTS)])
        return await Zygote.start(
            SandboxSpec(tier=self.tier, env=allowed(os.environ), limits=limits),
            self.probed,
            folder=self.folder / f"zygote-{next(self._numbers)}",
            target=target,
            timeout_s=timeout_s,
            **options,
        )

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    def close(self) -> None:
        if self._zygote is not None:
            self.runner.run(self._zygote.close())
        self.runner.close()


@pytest.fixture(scope="module", params=["process", "namespaces"])
def lab(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    probed: Probe,
    bare_python: str,
) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("lab"), probed, bare_python, request.param)
    yield lab
    lab.close()


def is_alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rsplit(") ", 1)[1][0] not in "ZX"


@pytest.fixture
def eventually() -> Callable[..., None]:
    """Polls a condition until it holds; fails naming it after ten seconds."""

    def wait(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
            time.sleep(0.005)

    return wait


@pytest.fixture
def alive() -> Callable[[int], bool]:
    return is_alive
