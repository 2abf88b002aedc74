"""Hugging Face folders of the policy as it was after a step, and the final one."""

from __future__ import annotations

import shutil
from pathlib import Path

from areal_sub.learner.learner import Learner

FINAL = "final"
_STEP = "step_"


def step_name(step: int) -> str:
    return f"{_STEP}{step:06d}"


def save_checkpoint(
    learner: Learner, folder: Path, name: str, *, tokenizer_path: str, keep: int
) -> Path:
    """Write `folder/name`, whole or not at all, then keep only the newest `keep` step folders."""
    target = folder / name
    folder.mkdir(exist_ok=True)
    learner.save_pretrained(target, tokenizer_path)
    for old in sorted(folder.glob(f"{_STEP}*"))[:-keep]:
        shutil.rmtree(old)
    return target


def newest_checkpoint(folder: Path) -> Path | None:
    """The final checkpoint, else the newest step's, else None."""
    if (folder / FINAL).is_dir():
        return folder / FINAL
    return max(folder.glob(f"{_STEP}*"), default=None)
