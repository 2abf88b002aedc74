"""When a periodic thing is due: every so many steps, epochs or seconds."""

from __future__ import annotations

import time

from areal_sub.config.schema import FrequencyConfig


class Every:
    """Call it once per step; true where at least one of the configured periods has passed."""

    def __init__(self, config: FrequencyConfig) -> None:
        self._config = config
        self._last_at = time.monotonic()
        self._last_epoch = 0

    def __call__(self, step: int, epoch: int) -> bool:
        config = self._config
        due = config.freq_steps is not None and step % config.freq_steps == 0
        if config.freq_epochs is not None and epoch >= self._last_epoch + config.freq_epochs:
            self._last_epoch = epoch
            due = True
        if config.freq_secs is not None and time.monotonic() >= self._last_at + config.freq_secs:
            due = True
        if due:
            self._last_at = time.monotonic()
        return due
