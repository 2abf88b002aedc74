"""Which run, and which rollout of it, is meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

from areal_sub.errors import RunNotFound
from areal_sub.trajectory.accounting import Judgement

_RUNS = Path("runs")  # `cluster.fileroot`, where nothing else is configured
_MAX_SHOWN = 6


def find_run(name: str) -> Path:
    """The folder of the run `name`: a path, or experiment/trial in `runs/`.

    Raises `RunNotFound`.
    """
    for folder in (Path(name), _RUNS / name):
        if (folder / "journal").is_dir():
            return folder
    known = {str(run.relative_to(_RUNS)): run for run in _runs_in(_RUNS)}
    beside = [str(run) for run in _runs_in(Path(name).parent.parent)]
    if Path(name).exists():
        problem = f"{name} is not the folder of a run: it has no journal"
    else:
        problem = f"there is no run {name!r}, neither as a path nor in {_RUNS}/"
    near = difflib.get_close_matches(name, [*known, *beside], n=1, cutoff=0.4)
    raise RunNotFound(problem + (f"; did you mean {near[0]}?" if near else ""))


def _runs_in(fileroot: Path) -> list[Path]:
    return sorted(journals.parent for journals in fileroot.glob("*/*/journal"))


def shown_id(judgement: Judgement, *, resumed: bool) -> str:
    """Where a run was resumed, ids may occur in several attempts: the attempt stands before it."""
    rollout_id = judgement.rollout.opened.rollout_id
    return f"{judgement.attempt.number}/{rollout_id}" if resumed else rollout_id


def find_rollout(judgements: Sequence[Judgement], name: str) -> Judgement:
    """The rollout `name`: its id or the beginning of one, perhaps as ATTEMPT/ID.

    Raises `RunNotFound` where there is none, or more than one.
    """
    attempt, slash, prefix = name.partition("/")
    if not slash:
        attempt, prefix = "", name
    among = [j for j in judgements if not slash or str(j.attempt.number) == attempt]
    exact = [j for j in among if j.rollout.opened.rollout_id == prefix]
    found = exact or [j for j in among if j.rollout.opened.rollout_id.startswith(prefix)]
    if len(found) == 1:
        return found[0]
    if found:
        raise RunNotFound(f"{name!r} may be {_some(_ids(found))}: write more of it")
    near = difflib.get_close_matches(name, _ids(judgements), n=3, cutoff=0.6)
    hint = f"; did you mean {_some(near)}?" if near else ""
    raise RunNotFound(f"this run has no rollout {name!r}{hint}")


def _ids(judgements: Iterable[Judgement]) -> list[str]:
    found = list(judgements)
    resumed = len({j.attempt.number for j in found}) > 1
    return [shown_id(j, resumed=resumed) for j in found]


def _some(names: Sequence[str]) -> str:
    more = [f"{len(names) - _MAX_SHOWN} more"] if len(names) > _MAX_SHOWN else []
    return " or ".join([*names[:_MAX_SHOWN], *more])
