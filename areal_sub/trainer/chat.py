"""`areal-sub chat`: talk to what was trained, over the same engine, proxy and pool as training.

With a run's agent each line becomes a task for that agent, and its turns are shown as they were
sampled; with `plain` each line continues a conversation with the bare model.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from areal_sub.config import Config, parse_config
from areal_sub.errors import ModelError
from areal_sub.printable import escaped
from areal_sub.records import Outcome
from areal_sub.rollout.attempt import CONTROL_TIMEOUT_S, Assignment
from areal_sub.trainer.agents import agent_text, agents_of, has_agent
from areal_sub.trainer.checkpoints import FINAL, newest_checkpoint
from areal_sub.trainer.scratch import scratch_folder
from areal_sub.trainer.wiring import Stack
from areal_sub.trajectory.tree import Trajectory


def chat(checkpoint: str, *, plain: bool, temperature: float, max_new_tokens: int) -> int:
    """Read lines from stdin until its end. Raises `ModelError`, `WorkflowError`."""
    folder, run_config = _find(Path(checkpoint))
    sampling = [
        f"actor.path={folder}",
        "actor.lora=null",  # merged into it
        f"gconfig.temperature={temperature}",
        f"gconfig.max_new_tokens={max_new_tokens}",
    ]
    if run_config is None:
        plain = True
        names = {"experiment_name": "chat", "trial_name": "chat"}
        config = parse_config(None, [*sampling, "actor.dtype=float32"], base=names)
    else:
        config = parse_config(run_config, sampling)
    asyncio.run(_chat(config, folder, plain=plain or not has_agent(config)))
    return 0


def _find(path: Path) -> tuple[Path, Path | None]:
    """The model folder, and the run's configuration where it belongs to a run."""
    if (path / "checkpoints").is_dir():
        path = newest_checkpoint(path / "checkpoints") or path
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{path} holds no model: give a run's folder that has checkpoints/{FINAL}, or a "
            "Hugging Face model folder"
        )
    run_config = path.parent.parent / "config.yaml"
    return path, run_config if run_config.is_file() else None


async def _chat(config: Config, folder: Path, *, plain: bool) -> None:
    console = Console(highlight=False)
    with scratch_folder(Path(tempfile.gettempdir())) as scratch:
        async with Stack.start(
            config,
            model_path=str(folder),
            tokenizer_path=str(folder),
            policy_version=0,
            journal=scratch / "chat.journal",
            logs=scratch,
            logs_stay=False,
        ) as stack:
            how = "the bare model" if plain else agent_text(config)
            console.print(f"{folder} through {how}; end with Ctrl-D", markup=False)
            talk = (
                _plain(config, stack, console) if plain else _agent(config, stack, folder, console)
            )
            await stack.guard(talk)


async def _agent(config: Config, stack: Stack, folder: Path, console: Console) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    agents, _ = agents_of(config, say=lambda text: console.print(text, markup=False))
    async for number, line in _lines(console):
        assignment = Assignment(
            rollout_id=f"chat-{number}",
            group_id=f"chat-{number}",
            task_id="chat",
            split="valid",
            data={"messages": [{"role": "user", "content": line}], "answer": ""},
            policy_version=0,
        )
        agent = agents.pick(assignment.group_id)
        trajectory = await stack.rollouts.run(assignment, agent, config.gconfig)
        _show(trajectory, tokenizer.decode, console)


def _show(trajectory: Trajectory, decode: object, console: Console) -> None:
    assert callable(decode)
    for turn in trajectory.turns.values():
        _print(console, decode(turn.context_token_ids.tolist()), "dim", end="")
        _print(console, decode(turn.token_ids.tolist()), "bold green")
    if trajectory.end.outcome is not Outcome.COMPLETED:
        end = trajectory.end
        _print(console, f"[{end.outcome}] {end.error}\n{end.traceback}", "red")


def _print(console: Console, text: str, style: str, end: str = "\n") -> None:
    """What an agent or a model wrote."""
    console.print(escaped(text), style=style, markup=False, end=end)


async def _plain(config: Config, stack: Stack, console: Console) -> None:
    from openai import APIError, AsyncOpenAI

    key = secrets.token_urlsafe(24)
    params = {
        "rollout_id": "chat",
        "key": key,
        "group_id": "chat",
        "task_id": "chat",
        "split": "valid",
        "policy_version": 0,
        "agent": "",
        "max_turns": 1_000_000,
        "gconfig": config.gconfig.model_dump(
            include={"max_new_tokens", "temperature", "top_p", "top_k", "override_agent"}
        ),
    }
    await stack.proxy.call("open_rollout", params, timeout_s=CONTROL_TIMEOUT_S)
    messages: list[dict[str, str]] = []
    base_url = f"http://127.0.0.1:{stack.proxy_port}/v1"
    async with AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0) as client:
        async for _, line in _lines(console):
            messages.append({"role": "user", "content": line})
            answer = ""
            try:
                stream = await client.chat.completions.create(
                    model="policy",
                    messages=cast(Any, messages),
                    stream=True,
                )
                async for chunk in stream:
                    piece = chunk.choices[0].delta.content or "" if chunk.choices else ""
                    answer += piece
                    _print(console, piece, "bold green", end="")
                console.print()
                messages.append({"role": "assistant", "content": answer})
            except APIError as error:
                messages.pop()
                _print(console, str(error), "red")


async def _lines(console: Console) -> AsyncIterator[tuple[int, str]]:
    """Non-empty lines of stdin, numbered; a prompt is shown where a person types."""
    loop = asyncio.get_running_loop()
    for number in itertools.count():
        if sys.stdin.isatty():
            console.print("you> ", style="bold", end="")
        line = await loop.run_in_executor(None, sys.stdin.readline)
        if not line:
            return
        if line.strip():
            yield number, line.strip()
