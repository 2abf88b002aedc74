"""Recovery points: all that a killed run needs to go on as if nothing had happened.

    folder/recovery-000007/
        model/          Hugging Face folder, float32 master weights; not with an adapter
        learner.pt      optimizer, step number, torch RNG, adapter (tensors and plain values)
        state.json      the caller's `extra`, Python's and numpy's RNG, size and digest of each file

Invariants: a point appears by one rename of a whole, flushed folder, so a save that is interrupted
at any moment leaves the earlier point in force; an earlier point is removed only after that.
Nothing is unpickled (`weights_only=True`). A point that does not match its own digests is an error
that names the file, never a silent step back to an older one.

Called by the trainer; one writer per folder.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from areal_sub.errors import CheckpointError
from areal_sub.learner.durable import whole_folder
from areal_sub.learner.learner import Learner

FORMAT = 1
_LEARNER = "learner.pt"


@dataclass(frozen=True, slots=True)
class Recovery:
    """A loaded recovery point."""

    folder: Path
    model_path: Path | None  # for `Learner.load(path=...)`; None: the run's own start, its base
    learner_state: dict[str, Any]  # for `Learner.load_state_dict`
    extra: dict[str, Any]  # as given to `save_recovery`
    rng: dict[str, Any]

    @property
    def learner_path(self) -> Path:
        """The file that `learner_state` was read from."""
        return self.folder / _LEARNER

    def restore_rng(self) -> None:
        """Set Python's and numpy's global generators (torch's is in `learner_state`)."""
        version, internal, gauss = self.rng["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, position, has_gauss, cached = self.rng["numpy"]
        np.random.set_state((name, np.asarray(keys, dtype=np.uint32), position, has_gauss, cached))


def save_recovery(folder: Path, learner: Learner, extra: dict[str, Any], *, keep: int = 1) -> Path:
    """Add a recovery point to `folder`, then remove all but the newest `keep`. Returns its path.

    `extra`: JSON-able; the trainer's own position (data, versions, ...).
    """
    points = _points(folder)
    serial = int(points[-1].name.removeprefix(_PREFIX)) + 1 if points else 0
    target = folder / f"{_PREFIX}{serial:06d}"
    for leftover in folder.glob(f".partial-{_PREFIX}*"):
        shutil.rmtree(leftover)
    with whole_folder(target) as partial:
        if not learner.has_adapter:
            learner.save_master(partial / "model")
        with (partial / _LEARNER).open("wb") as file:  # by its path, torch hides why it cannot
            torch.save(learner.state_dict(), file)
        state = {
            "format": FORMAT,
            "extra": extra,
            "rng": {"python": random.getstate(), "numpy": _numpy_rng()},
            "files": {
                str(path.relative_to(partial)): _fingerprint(path)
                for path in sorted(partial.rglob("*"))
                if path.is_file()
            },
        }
        (partial / "state.json").write_text(json.dumps(state))
    for old in _points(folder)[:-keep]:
        # Renamed first: half a point must not look like one.
        shutil.rmtree(old.rename(folder / f".partial-{old.name}"))
    return target


def load_recovery(folder: Path) -> Recovery | None:
    """The newest recovery point in `folder`; None where there is none.

    Raises `CheckpointError` naming the file that is missing or damaged.
    """
    points = _points(folder)
    if not points:
        return None
    point = points[-1]
    extra, rng, files = _read_state(point)
    for name, fingerprint in files.items():
        path = point / name
        try:
            found = _fingerprint(path)
        except OSError as error:
            raise _damaged(point, path, str(error)) from error
        if found != fingerprint:
            raise _damaged(point, path, f"it is {found}, saved was {fingerprint}")
    learner_path = point / _LEARNER
    try:
        learner_state = torch.load(learner_path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise _damaged(point, learner_path, str(error)) from error
    model_path = None if learner_state.get("adapter") else point / "model"
    return Recovery(point, model_path, learner_state, extra, rng)


def newest_extra(folder: Path) -> dict[str, Any] | None:
    """The `extra` of the point that `load_recovery` would load, without its large files.

    Raises `CheckpointError`.
    """
    points = _points(folder)
    return _read_state(points[-1])[0] if points else None


_PREFIX = "recovery-"


def _read_state(point: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(extra, rng, files) of its `state.json`."""
    path = point / "state.json"
    try:
        state = json.loads(path.read_text())
        if state["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has format {state['format']!r}; this release reads {FORMAT}"
            )
        return state["extra"], state["rng"], state["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(point, path, f"{type(error).__name__}: {error}") from error


def _points(folder: Path) -> list[Path]:
    """Recovery points, oldest first."""
    return sorted(folder.glob(_PREFIX + "[0-9]" * 6))


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"num_bytes": path.stat().st_size, "sha256": digest}


def _numpy_rng() -> list[Any]:
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return [name, np.asarray(keys).tolist(), position, has_gauss, cached]


def _damaged(point: Path, path: Path, reason: str) -> CheckpointError:
    """`path`: the file of `point` that is damaged."""
    earlier = [other.name for other in _points(point.parent) if other.name < point.name]
    if earlier:
        advice = f"Remove the folder {point} to go on from the earlier {earlier[-1]}, or set"
    else:
        advice = "There is no earlier one: choose another trial_name, or set"
    return CheckpointError(
        f"recovery point damaged: {path}: {reason}. {advice} recover.mode=disabled to start anew"
    )
