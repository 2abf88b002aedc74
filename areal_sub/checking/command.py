"""The command `areal-sub check-agent`: from its arguments to what it prints.

Runs the agent as a training run would, in sandboxed children against the real proxy, with a
scripted engine behind it. Called by `cli.py`. Raises `ArealSubError` where the check cannot be
made; whatever the agent does is a finding.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from areal_sub.checking.findings import Findings, findings_of
from areal_sub.checking.tokenizer import write_tokenizer
from areal_sub.config import Config, parse_config
from areal_sub.errors import ConfigError, TaskError, WorkflowError
from areal_sub.printable import escaped, one_line
from areal_sub.rollout.attempt import Assignment
from areal_sub.rollout.pool import check_plain
from areal_sub.trainer.agents import agent_text, agents_of, check_tasks, has_agent
from areal_sub.trainer.datasets import Task
from areal_sub.trainer.scratch import scratch_folder
from areal_sub.trainer.wiring import Stack
from areal_sub.trajectory.tree import Trajectory

TASK = {
    "question": "What is 7 * 8?",
    "answer": "56",
    "messages": [{"role": "user", "content": "What is 7 * 8?"}],
}
NOWHERE = "nowhere.invalid:443"
"""Allowed, so that there is an egress proxy, which sees and tells what else the agent wants."""
UNSEEN_IN_TIER = "; what the agent wants to reach cannot be seen in it"
UNSEEN_BY_CHOICE = "; what else the agent wants to reach was not looked at"
IGNORES_NO_PROXY = (
    "it asks the proxy that HTTPS_PROXY names for the model, too, whatever NO_PROXY says: it "
    "cannot be trained with rollout.openai.sandbox.network.allow"
)
BASE: dict[str, Any] = {
    "experiment_name": "check",
    "trial_name": "check",
    "rollout": {
        "timeout_s": 60.0,
        "openai": {
            "mode": "subproc",
            "max_turns": 32,
            "sandbox": {"network": {"allow": [NOWHERE]}},
        },
    },
}


def check_agent(
    agent: str | None,
    overrides: Sequence[str],
    *,
    config_file: str | None,
    task: str | None,
    script: str | None,
    num: int,
    as_json: bool,
) -> int:
    """Run `agent` (an import path or `cmd:...`; None: the configuration's) `num` times, and say
    what it used. `task`, `script`: JSON, or a file of it. 0: it can be trained; 1: not as it is.
    """
    words = [f"workflow={agent}"] if agent is not None else []
    file = Path(config_file) if config_file is not None else None
    with scratch_folder(Path(tempfile.gettempdir())) as folder:
        model = [f"actor.path={folder}", f"cluster.fileroot={folder / 'runs'}"]
        words = [*words, *overrides, *model]
        config = parse_config(file, words, base=BASE)
        if not has_agent(config):
            raise ConfigError("which agent? areal-sub check-agent package.module.Name")
        data = _task(task)
        lines = _script(script)
        write_tokenizer(folder)
        (folder / "journal").mkdir()
        console = Console(stderr=as_json, highlight=False)
        unseen, notes = "", list[str]()
        try:
            trajectories, sandbox = asyncio.run(_run(config, folder, data, lines, num, console))
            if any(map(_asked_in_vain, trajectories)):
                unseen, notes = UNSEEN_BY_CHOICE, [IGNORES_NO_PROXY]
        except WorkflowError as error:
            if NOWHERE not in str(error):
                raise
            unseen = UNSEEN_IN_TIER
        if unseen:
            words.append("rollout.openai.sandbox.network.allow=[]")
            config = parse_config(file, words, base=BASE)
            trajectories, sandbox = asyncio.run(_run(config, folder, data, lines, num, console))
            sandbox += unseen
        sandbox = sandbox.replace(f", which lets agents reach {NOWHERE}", "")
    found = findings_of(trajectories, max_turns=config.rollout.openai.max_turns, notes=notes)
    if as_json:
        shown = {"agent": agent_text(config), "sandbox": sandbox, **found.to_map()}
        sys.stdout.write(json.dumps(shown, indent=2) + "\n")
    else:
        _say(console, agent_text(config), sandbox, found)
    return 0 if found.is_trainable else 1


async def _run(
    config: Config,
    folder: Path,
    data: dict[str, Any],
    script: list[str],
    num: int,
    console: Console,
) -> tuple[list[Trajectory], str]:
    agents, _ = agents_of(config, say=lambda text: console.print(text, markup=False))
    check_tasks(agents, [Task(task_id="check", data=data)], Path.cwd())
    engine = ("areal_sub.checking.scripted_engine", {"script": script})
    async with Stack.start(
        config,
        model_path=str(folder),
        tokenizer_path=str(folder),
        policy_version=0,
        journal=folder / "journal" / "check",
        logs=folder,
        logs_stay=False,
        engine=engine,
    ) as stack:
        for note in await stack.guard(stack.warm(agents.agents)):
            console.print(f"note: {note}", markup=False)
        trajectories = []
        for number in range(num):
            group = f"check-{number}"
            assignment = Assignment(
                rollout_id=group,
                group_id=group,
                task_id="check",
                split="train",
                data=data,
                policy_version=0,
            )
            run = stack.rollouts.run(assignment, agents.pick(group), config.gconfig)
            trajectories.append(await stack.guard(run))
        return trajectories, stack.sandbox


def _asked_in_vain(trajectory: Trajectory) -> bool:
    """Whether it asked the egress proxy for the model, which only the child itself can reach."""
    return any(where.startswith("127.0.0.1:") for where in trajectory.end.egress_refused)


def _task(given: str | None) -> dict[str, Any]:
    if given is None:
        return TASK
    data = _json(given, "--task")
    if not isinstance(data, dict):
        raise TaskError(f"--task: a JSON object, as a row of the dataset, not {data!r}")
    check_plain(data, "--task")
    return data


def _script(given: str | None) -> list[str]:
    if given is None:
        return []
    lines = _json(given, "--script")
    if not (isinstance(lines, list) and lines and all(isinstance(line, str) for line in lines)):
        raise TaskError("--script: a JSON array of texts, each an answer of the model's")
    return lines


def _json(given: str, option: str) -> Any:
    try:
        text = given if given.lstrip()[:1] in ("{", "[") else Path(given).read_text("utf-8")
        return json.loads(text)
    except (OSError, ValueError) as error:
        raise TaskError(f"{option}: neither JSON nor a file of it: {error}") from None


def _say(console: Console, agent: str, sandbox: str, found: Findings) -> None:
    """What came from the agent is shown as text, whatever is in it."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")

    def row(name: str, value: str) -> None:
        if value:
            table.add_row(name, Text(one_line(value)))

    row("agent", agent)
    row("sandbox", sandbox or "none (mode=inline)")
    for number, attempt in enumerate(found.attempts, 1):
        reward = attempt.reward if attempt.reward is not None else attempt.turn_rewards or "none"
        row(
            f"run {number}",
            f"{attempt.outcome} after {attempt.wall_s:.1f} s, {attempt.num_calls} calls, "
            f"reward {reward}",
        )
    row("dialects", _counted(found.dialects) or "none: no model call was seen")
    row("models", _counted(found.models))
    num_calls = sum(found.dialects.values())
    row("streamed", f"{found.num_streamed} of {num_calls} calls")
    row("tools", f"offered in {found.num_offering_tools} calls, used by {found.num_calling_tools}")
    row("structured", f"{found.num_constrained} calls" if found.num_constrained else "")
    row("retries", f"{found.num_retries} calls" if found.num_retries else "")
    row("cut off", f"{found.num_cut} answers" if found.num_cut else "")
    row("forks", _counted(found.forks) or "none")
    row("wanted", _counted(found.egress_refused))
    share = f"{100 * found.share_verbatim:.2f} % of what would be trained is as sampled"
    row("exact", share if num_calls else "nothing was sampled")
    console.print(table)
    for attempt in found.attempts:
        for text in (attempt.traceback, attempt.stderr_tail):
            if text.strip() and not found.is_trainable:
                console.print(Text(escaped(text.rstrip()), style="dim"))
    for note in found.notes:
        console.print(Text("• " + one_line(note)))
    if found.is_trainable:
        console.print(Text("It can be trained as it is, token for token.", style="bold green"))
    elif found.is_exact:
        console.print(Text("Its calls can be trained; see above for what is amiss.", style="bold"))
    else:
        console.print(Text("It cannot be trained as it is.", style="bold red"))


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({num})" for name, num in counts.items())
