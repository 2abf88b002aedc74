"""What each process of a run is told at its start: its part of the config, and its paths.

All of it is JSON. Called by `wiring`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from areal_sub.config import Config
from areal_sub.errors import ConfigError
from areal_sub.rollout.workspace import fixed_part

_TEMPORARY = (Path("/tmp"), Path("/var/tmp"))


def engine_settings(
    config: Config, socket: Path, model_path: str, tokenizer_path: str, policy_version: int
) -> dict[str, Any]:
    """Of the engine that the config names. `policy_version`: of the weights at `model_path`."""
    engine = config.engine
    common = {
        "socket_path": str(socket),
        "model_path": model_path,
        "dtype": engine.dtype or config.actor.dtype,
        "max_running_requests": engine.max_running_requests,
        "max_model_len": engine.max_model_len,
        "seed": config.seed,
        "policy_version": policy_version,
    }
    if engine.type == "vllm":
        # A server that was started by someone else has the trainer's working directory at best.
        lora = config.actor.lora
        return {
            **common,
            **engine.vllm.model_dump(),
            "model_path": str(Path(model_path).resolve()),
            "lora_rank": lora.rank if lora is not None else None,
        }
    return {
        **common,
        "tokenizer_path": tokenizer_path,
        "device": engine.device,
        "num_threads": engine.num_threads,
    }


def proxy_settings(
    config: Config, sockets: Mapping[str, Path], tokenizer_path: str, journal: Path
) -> dict[str, Any]:
    """`sockets`: where `proxy`, `listeners` and `engine` are called."""
    return {
        "agent_host": "127.0.0.1",
        "agent_port": 0,
        "control_path": str(sockets["proxy"]),
        "listeners_path": str(sockets["listeners"]),
        "engine_path": str(sockets["engine"]),
        "journal_path": str(journal),
        "journal": config.journal.model_dump(),
        "tokenizer_path": tokenizer_path,
        "chat_template": config.rollout.openai.chat_template,
        "tool_call_parser": config.rollout.openai.tool_call_parser,
        "reasoning_parser": config.rollout.openai.reasoning_parser,
        "request_timeout_s": config.rollout.request_timeout_s,
    }


def supervisor_settings(
    config: Config, socket: Path, folder: Path, run_folder: Path
) -> dict[str, Any]:
    """Raises `ConfigError` where agents would see the whole home folder, or what is not there."""
    openai = config.rollout.openai
    _check_there("rollout.openai.python_path", openai.python_path)
    _check_there("rollout.openai.sandbox.readable", openai.sandbox.readable)
    _check_there("rollout.openai.sandbox.mounts", openai.sandbox.mounts.values())
    python_path = _python_path(openai.python_path)
    hidden = [_hidden(Path(config.cluster.fileroot).resolve(), run_folder, python_path)]
    grader_hidden = [*hidden]  # what is around workspaces may be what rollouts are graded by
    if openai.sandbox.workspace is not None:
        hidden.append(_around_workspaces(openai.sandbox.workspace, python_path))
    return {
        "socket_path": str(socket),
        "work_dir": str(folder / "children"),
        "python_path": python_path,
        "start_timeout_s": config.rollout.setup_timeout_s,
        "env_passthrough": openai.env_passthrough,
        "max_children": openai.num_children or config.rollout.max_concurrent_rollouts,
        "sandbox": openai.sandbox.model_dump(),
        "hidden": hidden,
        "grader_hidden": grader_hidden,
        "grader_memory_bytes": openai.reward_max_memory_bytes,
    }


def _check_there(key: str, paths: Iterable[str]) -> None:
    for path in paths:
        if not path or not Path(path).exists():
            raise ConfigError(f"{key}: there is no {path!r} (relative paths begin at {Path.cwd()})")


def _python_path(extra: list[str]) -> list[str]:
    """Where children find the agent: where the user stands, then beside the user's script."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    beside = [str(Path(script).parent)] if script else []
    folders = [Path(folder).resolve() for folder in (*extra, str(Path.cwd()), *beside)]
    home = Path.home().resolve()
    for folder in folders:
        holds = "your home folder" if home.is_relative_to(folder) else ""
        if folder in _TEMPORARY:  # a child has its own in that place
            holds = "everybody's temporary files"
        if holds:
            raise ConfigError(
                f"agents can read the folders that they are imported from, and {folder} holds "
                f"{holds}: start in a folder of its own for your project"
            )
    return [str(folder) for folder in dict.fromkeys(folders)]


def _hidden(fileroot: Path, run_folder: Path, python_path: list[str]) -> str:
    """Checkpoints and journals of this run and of others: agents have no business there."""
    holds_agents = any(Path(folder).is_relative_to(fileroot) for folder in python_path)
    return str(run_folder.resolve() if holds_agents else fileroot)


def _around_workspaces(template: str, python_path: list[str]) -> str:
    """Agents find a copy of their own; the templates, graders among them maybe, are not theirs.

    Raises `ConfigError` where that would hide the agents' code.
    """
    folder = fixed_part(template, Path.cwd())
    for path in python_path:
        if Path(path).is_relative_to(folder):
            raise ConfigError(
                f"rollout.openai.sandbox.workspace={template}: the folder around all workspaces is "
                f"hidden from agents, and {folder} holds {path}, which they are imported from: put "
                "workspaces into a folder of their own"
            )
    return str(folder)
