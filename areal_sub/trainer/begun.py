"""Whether a trial that was begun may go on with this configuration and these tasks.

With `recover.mode=auto` a run goes on with the policy, and with the groups, that earlier attempts
left. So it has to have their model and their tasks: others are refused before anything of the run's
folder is written. Whatever else differs from the latest attempt is told. Called by `trainer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from areal_sub.config import Config, parse_config
from areal_sub.config.changes import Change, changes
from areal_sub.config.source import shown
from areal_sub.errors import ConfigError
from areal_sub.learner.checkpoint import newest_extra
from areal_sub.records import Fault
from areal_sub.trainer.run_dir import RunDir
from areal_sub.trajectory.run_log import read_run

TASKS_DIGEST = "tasks_digest"  # in a recovery point's `extra`; those of before have none

_MODEL = "actor.path"
# What tasks are made from.
_DATASET = tuple(f"train_dataset.{name}" for name in ("path", "split", "size", "dataset_kwargs"))
_SEED = "seed"


def check_goes_on(config: Config, run: RunDir, tasks_digest: str, *, from_file: bool) -> list[str]:
    """What to tell the user of it, a line each; none where the trial is a new one.

    `from_file`: whether the tasks are a file's, and so the same whenever they are read. Raises
    `ConfigError` where model or tasks are others, `CheckpointError` where the recovery point is
    damaged.
    """
    if config.recover.mode != "auto":
        return []
    extra = newest_extra(run.recover)
    found, notes = _changes(config, run)
    by_path = {change.path: change for change in found}
    model = by_path.get(_MODEL)
    if model is not None and not _is_same_folder(model) and _has_begun(run, extra):
        raise _refusal(run, [model])
    if extra is not None and extra.get(TASKS_DIGEST, tasks_digest) != tasks_digest:
        keys = _DATASET if from_file else (*_DATASET, _SEED)
        made_from = [by_path[key] for key in keys if key in by_path]
        if made_from or from_file:
            raise _refusal(run, made_from)
        # The same generator gave others, as one does that follows no seed.
        notes.append("note: the tasks to train on are others than in the last attempt")
    told = ", ".join(str(change) for change in found if change.path != "recover.mode")
    return [*notes, f"changed since the last attempt: {told}"] if told else notes


def _changes(config: Config, run: RunDir) -> tuple[list[Change], list[str]]:
    """Since the last attempt, and what is wrong with that one's `config.yaml`."""
    if not run.config.exists():
        return [], []
    try:
        return changes(parse_config(run.config, []), config), []
    except ConfigError as error:  # it is of another release, or was edited
        why = str(error).partition("\n")[0]
        return [], [f"note: what changed since the last attempt cannot be told: {why}"]


def _is_same_folder(change: Change) -> bool:
    return Path(change.before).resolve() == Path(change.now).resolve()


def _has_begun(run: RunDir, extra: Mapping[str, Any] | None) -> bool:
    """Whether there is anything of earlier attempts' model: a policy, or rollouts to train."""
    return extra is not None or any(
        log.opened.split == "train"
        and log.end is not None
        and log.end.outcome.fault is not Fault.INFRASTRUCTURE
        for attempt in read_run(run.journals)
        for log in attempt.rollouts.values()
    )


def _refusal(run: RunDir, found: Sequence[Change]) -> ConfigError:
    """`found`: the keys to set back; where there is none, the tasks' file has changed."""
    begun, back = "other tasks than train_dataset.path has now", "put them back"
    if found:
        pairs = [f"{c.path}={_value(c.before)}, not {_value(c.now)}" for c in found]
        begun, back = ", and with ".join(pairs), "set that back"
    return ConfigError(
        f"recover.mode=auto: this trial ({run.root}) was begun with {begun}: {back}, choose "
        "another trial_name, or start anew with recover.mode=disabled"
    )


def _value(value: Any) -> str:
    return value if isinstance(value, str) else shown(value)
