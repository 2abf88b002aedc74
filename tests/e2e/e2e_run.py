"""One `areal-sub train` process of a test, and everything that it started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

REPO = Path(__file__).resolve().parents[2]
WAIT_S = 300.0
MODULES = {
    "engine": "areal_sub.engines.embedded",
    "proxy": "areal_sub.proxy",
    "supervisor": "areal_sub.rollout.supervisor",
}


class Run:
    """One `areal-sub train` process and everything that it started."""

    def __init__(
        self,
        folder: Path,
        policy: Path,
        *overrides: str,
        config: Path = REPO / "tests/e2e/config.yaml",
        cwd: Path = REPO / "tests/e2e",
        program: Sequence[str] = ("-m", "areal_sub"),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.root = folder / "runs" / "e2e" / "run"
        self.output = folder / "output.txt"
        env = {**os.environ, "TMPDIR": str(folder), "COLUMNS": "200", **(variables or {})}
        command = [
            *(sys.executable, *program, "train"),
            *("--config", str(config)),
            f"cluster.fileroot={folder / 'runs'}",
            f"actor.path={policy}",
            *overrides,
        ]
        with self.output.open("w") as output:
            self.process = subprocess.Popen(command, cwd=cwd, env=env, stdout=output, stderr=output)
        self._seen: dict[int, psutil.Process] = {}

    def note_family(self) -> set[str]:
        """Remember every process of the run that is alive now; the modules that they run."""
        modules = set()
        for process in psutil.Process(self.process.pid).children(recursive=True):
            self._seen[process.pid] = process
            try:
                command = process.cmdline()
            except psutil.NoSuchProcess:
                continue
            modules |= {word for word in command if word.startswith(("areal_sub.", "sandbox"))}
        return modules

    def survivors(self) -> list[psutil.Process]:
        """Processes noted earlier that are still alive."""
        return [
            process
            for process in self._seen.values()
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        ]

    def process_of(self, component: str) -> psutil.Process:
        """The one that runs now. It is started again while the test looks for it, maybe."""
        found: list[psutil.Process] = []

        def look() -> bool:
            for process in psutil.Process(self.process.pid).children():
                try:
                    if MODULES[component] in process.cmdline():
                        found.append(process)
                except psutil.NoSuchProcess:
                    continue
            return bool(found)

        self.wait_until(look, f"process of the {component}")
        return found[-1]

    def incidents(self) -> list[dict[str, Any]]:
        path = self.root / "incidents.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def num_steps(self) -> int:
        path = self.root / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def wait_for_steps(self, num_steps: int) -> None:
        self.wait_until(lambda: self.num_steps() >= num_steps, f"{num_steps} steps")

    def wait_until(
        self, condition: Callable[[], bool], what: str, timeout_s: float = WAIT_S
    ) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"no {what} in {timeout_s} s:\n{self.output.read_text()}")
            time.sleep(0.02)

    def finish(self, timeout_s: float = WAIT_S) -> str:
        """Wait for its end; what it printed. Every rollout is accounted for, however it ended."""
        self.process.wait(timeout=timeout_s)
        output = self.output.read_text()
        assert "not accounted for" not in output, output
        return output
