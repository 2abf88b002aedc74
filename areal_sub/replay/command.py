"""The command `areal-sub replay`: from its arguments to what it prints.

Runs the agent of a run again on the tasks of recorded rollouts, against the real proxy, which is
given the recorded answers. Called by `cli.py`. Raises `RunNotFound`, `RecordError`, `ConfigError`.
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
from rich.text import Text

from areal_sub.config import Config, parse_config
from areal_sub.errors import RunNotFound
from areal_sub.inspection.find import find_rollout, find_run
from areal_sub.printable import escaped, one_line
from areal_sub.records import Outcome
from areal_sub.replay.debugged import InThisProcess
from areal_sub.rollout.attempt import Assignment, RolloutRunner
from areal_sub.trainer.agents import agents_of
from areal_sub.trainer.datasets import load_tasks
from areal_sub.trainer.scratch import scratch_folder
from areal_sub.trainer.wiring import Stack
from areal_sub.trajectory.accounting import Judgement, judge_run
from areal_sub.trajectory.run_log import read_rollout, read_run
from areal_sub.trajectory.tree import Trajectory

# The model's own limit is not in the journal; what was asked then fitted.
MAX_MODEL_LEN = 2**20
DEBUGGING_S = 86_400.0


def replay_run(
    run: str, rollout: str | None, overrides: Sequence[str], *, inline: bool, limit: int
) -> int:
    """Replay one rollout, or the first `limit` (0: all) that have ended and made a call.

    Returns 1 where an agent went another way than it is recorded to have gone.
    """
    folder = find_run(run)
    judgements = judge_run(read_run(folder / "journal"))
    if rollout is not None:
        chosen = [find_rollout(judgements, rollout)]
    else:
        ended = {}  # an id may occur in several attempts: the latest
        for judgement in judgements:
            if judgement.rollout.end is not None and judgement.rollout.num_turns:
                ended[judgement.rollout.opened.rollout_id] = judgement
        chosen = list(ended.values())[: limit or None]
    if not chosen:
        raise RunNotFound(f"{folder}: no rollout has ended that made a call")
    mode = ["rollout.openai.mode=inline", f"rollout.timeout_s={DEBUGGING_S}"]
    words = mode if inline else ["rollout.openai.mode=subproc"]
    config = parse_config(folder / "config.yaml", [*words, *overrides])
    here = [str(Path.cwd()), *(str(Path(p).resolve()) for p in config.rollout.openai.python_path)]
    sys.path += [path for path in here if path not in sys.path]
    console = Console(highlight=False)
    return asyncio.run(_replay(config, folder, chosen, console, inline=inline))


async def _replay(
    config: Config,
    folder: Path,
    chosen: Sequence[Judgement],
    console: Console,
    *,
    inline: bool,
) -> int:
    tasks = _tasks(config)
    tokenizer = _tokenizer(folder, chosen[0])
    agents, eval_agents = agents_of(config, say=lambda text: console.print(Text(text)))
    num_other = 0
    with scratch_folder(Path(tempfile.gettempdir())) as scratch:
        (scratch / "journal").mkdir()
        report = scratch / "replay.json"
        sources = [[str(j.attempt.journal), j.rollout.opened.rollout_id] for j in chosen]
        settings = {
            "rollouts": sources,
            "report_path": str(report),
            "max_model_len": config.engine.max_model_len or MAX_MODEL_LEN,
        }
        async with Stack.start(
            config,
            model_path=str(tokenizer),
            tokenizer_path=str(tokenizer),
            policy_version=0,
            journal=scratch / "journal" / "replay",
            logs=scratch,
            logs_stay=False,
            engine=("areal_sub.replay.engine", settings),
        ) as stack:
            rollouts = stack.rollouts
            if inline:
                rollouts = RolloutRunner(
                    proxy=stack.proxy,
                    proxy_port=stack.proxy_port,
                    stream=stack.stream,
                    agents=InThisProcess(),
                    config=config.rollout,
                    grader=stack.rollouts.grader,
                )
            for judgement in chosen:
                opened = judgement.rollout.opened
                data = tasks.get((opened.split, opened.task_id))
                if data is None:
                    raise RunNotFound(
                        f"rollout {opened.rollout_id}: its task {opened.task_id} is not in the "
                        f"{opened.split} dataset of the configuration any more"
                    )
                is_train = opened.split == "train"
                # As it was picked then: see the trainer's loop, and its evaluation.
                name = opened.group_id if is_train else f"valid-{int(opened.group_id[-6:])}"
                agent = (agents if is_train else eval_agents).pick(name)
                assignment = Assignment(
                    rollout_id=opened.rollout_id,
                    group_id=opened.group_id,
                    task_id=opened.task_id,
                    split=opened.split,
                    data=data,
                    policy_version=0,
                )
                replayed = await stack.guard(rollouts.run(assignment, agent, config.gconfig))
                _, _, end = read_rollout(judgement.attempt.journal, opened.rollout_id)
                recorded = None if end is None else (end.outcome, end.reward, end.turn_rewards)
                found = json.loads(report.read_text())[opened.rollout_id]
                num_other += not _say(console, judgement, recorded, replayed, found)
    return int(num_other > 0)


def _tasks(config: Config) -> dict[tuple[str, str], dict[str, Any]]:
    datasets = {"train": config.train_dataset, "valid": config.valid_dataset}
    return {
        (split, task.task_id): task.data
        for split, dataset in datasets.items()
        if dataset is not None
        for task in load_tasks(dataset, seed=config.seed)
    }


def _tokenizer(folder: Path, judgement: Judgement) -> Path:
    began = judgement.attempt.began
    known = [Path(began.tokenizer_path)] if began is not None else []
    known += sorted((folder / "checkpoints").glob("*"))
    for path in known:
        if (path / "tokenizer.json").is_file():
            return path
    raise RunNotFound(f"{folder}: the run's tokenizer is not at hand; it was at {known[:1]}")


def _say(
    console: Console,
    judgement: Judgement,
    recorded: tuple[Outcome, float | None, dict[str, float]] | None,
    replayed: Trajectory,
    found: dict[str, Any],
) -> bool:
    """What came of it; whether all went as recorded."""
    end = replayed.end
    then = "unended" if recorded is None else _ending(recorded[0], recorded[1])
    now = _ending(end.outcome, end.reward)
    same = not found["divergences"] and found["num_given"] == found["num_turns"] and then == now
    calls = f"{found['num_given']} of {found['num_turns']} recorded answers given"
    how = "as recorded" if same else f"recorded {then}, now {now}"
    rollout_id = one_line(judgement.rollout.opened.rollout_id)
    console.print(Text(f"{rollout_id}  {how}: {calls}", style="green" if same else "yellow"))
    for divergence in found["divergences"]:
        console.print(Text(f"  {one_line(divergence)}"), soft_wrap=True)
    if not same and end.outcome is not Outcome.COMPLETED:
        console.print(Text(escaped(f"{end.error}\n{end.traceback or end.stderr_tail}".rstrip())))
    return same


def _ending(outcome: Outcome, reward: float | None) -> str:
    return str(outcome) + ("" if reward is None else f" {reward:g}")
