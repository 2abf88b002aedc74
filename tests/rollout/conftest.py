"""A real supervisor process, started as the trainer starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from areal_sub.config.schema import SandboxConfig
from areal_sub.records import RunRequest
from areal_sub.rollout.environ import supervisor_environment

ROOT = Path(__file__).parents[2]
AGENTS = Path(__file__).parent / "agents"


@pytest.fixture
def start_supervisor() -> type[Supervisor]:
    return Supervisor


class Supervisor:
    """Started on construction; `path` is its socket."""

    def __init__(self, folder: Path, *, environ: dict[str, str], **settings: Any) -> None:
        self.folder = folder
        self.path = folder / "supervisor.sock"
        sandbox = settings.pop("sandbox", {})
        settings = {
            "socket_path": str(self.path),
            "work_dir": str(folder / "children"),
            "python_path": [str(AGENTS)],
            "env_passthrough": [],
            "max_children": 8,
            "sandbox": SandboxConfig(**sandbox).model_dump(),
            # an interpreter without SDKs: tests do not wait for them to import
            "python": getattr(sys, "_base_executable", sys.executable),
            **settings,
        }
        (folder / "supervisor.json").write_text(json.dumps(settings))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "areal_sub.rollout.supervisor", folder / "supervisor.json"],
            stdin=subprocess.PIPE,
            cwd=ROOT,
            env=supervisor_environment(environ, settings["env_passthrough"]),
            start_new_session=True,
        )

    def stop(self) -> None:
        """As the end of the trainer does it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(timeout=15) == 0


@pytest.fixture(scope="module")
def supervisor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervisor]:
    import os

    environ = {
        **os.environ,
        "AWS_SECRET_ACCESS_KEY": "canary",
        "LD_LIBRARY_PATH": "/canary",
        "LET_THROUGH": "yes",
    }
    running = Supervisor(
        tmp_path_factory.mktemp("supervisor"),
        environ=environ,
        env_passthrough=["LET_THROUGH"],
        sandbox={"max_output_bytes": 2**18, "max_result_bytes": 2**20},
    )
    yield running
    running.stop()
    assert not (running.folder / "children").exists()


@pytest.fixture
def make_request() -> Callable[..., RunRequest]:
    def make(agent: str, **data: Any) -> RunRequest:
        return RunRequest(
            rollout_id="rollout-1",
            target=f"rollout_agents:{agent}" if agent else "",
            pickled=data.pop("pickled", b""),
            workflow_kwargs=data.pop("workflow_kwargs", {}),
            env=data.pop(
                "env", {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1", "OPENAI_API_KEY": "k"}
            ),
            timeout_s=data.pop("timeout_s", 30.0),
            data=data,
        )

    return make
