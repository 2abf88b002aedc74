"""The agent of `async.py`'s real case: the default run's, whose tool takes long now and then.

The wait is log-normal as the stub's lengths are, so a batch's slowest rollout takes many times the
median; it is drawn from the rollout's own key, and the same whatever the setting.
"""

from __future__ import annotations

import asyncio
import math
import random
from typing import Any

from areal_sub.workflow.openai.math_agent import MathToolAgent

SIGMA = math.log(10) / 2.326


class SlowToolAgent(MathToolAgent):
    """`median_s`: half of the rollouts wait shorter; none longer than 32 times that."""

    def __init__(self, *, median_s: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._median_s = median_s

    async def run(self, data: dict[str, Any], **extra_kwargs: Any) -> float:
        wait_s = self._median_s * math.exp(SIGMA * random.gauss(0, 1))
        await asyncio.sleep(min(wait_s, 32 * self._median_s))
        return await super().run(data, **extra_kwargs)
