"""The trainer: `Trainer` (public), `loop.py` (the main flow), and what it is wired from.

Importing the package loads no torch: the CLI reads task sources from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from areal_sub.trainer.trainer import Trainer, TrainResult

__all__ = ["TrainResult", "Trainer"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("areal_sub.trainer.trainer"), name)
