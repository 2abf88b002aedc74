"""Learning rate as a function of the training step. Pure; called by the learner in each step."""

from __future__ import annotations

import math

from areal_sub.config.schema import OptimizerConfig


def learning_rate(step: int, *, total_steps: int, optimizer: OptimizerConfig) -> float:
    """Learning rate of training step `step` (from 0).

    Linear warm-up from 0 over `warmup_steps_proportion * total_steps` steps (the first step already
    learns: it has the first share, not 0), then constant, or linear or half a cosine down to
    `min_lr_ratio * lr`, which is reached with the last step and kept after it.
    """
    num_warmup = math.ceil(optimizer.warmup_steps_proportion * total_steps)
    if step < num_warmup:
        return optimizer.lr * (step + 1) / num_warmup
    num_decay = total_steps - 1 - num_warmup
    progress = min(1.0, (step - num_warmup) / num_decay) if num_decay > 0 else 0.0
    match optimizer.lr_scheduler_type:
        case "constant":
            share = 1.0
        case "linear":
            share = 1.0 - progress
        case "cosine":
            share = 0.5 * (1.0 + math.cos(math.pi * progress))
    if optimizer.lr_scheduler_type != "constant":
        share = optimizer.min_lr_ratio + (1.0 - optimizer.min_lr_ratio) * share
    return optimizer.lr * share
