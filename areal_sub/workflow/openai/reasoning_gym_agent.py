"""Ready agent for the tasks of reasoning-gym (`train_dataset.path: reasoning-gym:TASK`).

One model call; the answer is taken out of the text and scored by the task's own scorer, which
gives partial credit for many tasks. Unlike its neighbours this module imports what it needs at
once: reasoning-gym takes seconds to import, which the warm zygote pays once, not each child.
"""

from __future__ import annotations

import math
import re
from typing import Any

from reasoning_gym.factory import create_dataset

from areal_sub.workflow.grading import final_answer, number
from areal_sub.workflow.openai.client import openai_client

_SAID = re.compile(r"\banswer(?:\s+is\b|\s*[:=])\s*:?\s*(.+)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.])-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?")


class ReasoningGymAgent:
    """Returns the task's score of the answer, 0 to 1.

    `system_prompt` is put in front of the task's question; other arguments are passed to
    `chat.completions.create`.
    """

    def __init__(
        self, *, model: str = "default", system_prompt: str | None = None, **sampling: Any
    ) -> None:
        self._system: list[Any] = (
            [{"role": "system", "content": system_prompt}] if system_prompt else []
        )
        self._sampling = {"model": model, **sampling}

    async def run(self, data: dict[str, Any], **extra_kwargs: Any) -> float:
        async with openai_client(extra_kwargs) as client:
            completion = await client.chat.completions.create(
                messages=[*self._system, *data["messages"]], **self._sampling
            )
        return score(completion.choices[0].message.content or "", data)


def score(text: str, data: dict[str, Any]) -> float:
    """reasoning-gym's score of the answer in `text`. Raises `ValueError` where it is no score."""
    made = data["reasoning_gym"]
    # Scorers read the task's parameters, and the entry; which tasks the dataset has is no matter.
    scorer = create_dataset(made["task"], seed=0, size=1, **made["parameters"])
    entry = {key: data[key] for key in ("question", "answer", "metadata")}
    value = float(scorer.score_answer(extract_answer(text, data["answer"]), entry))
    if not math.isfinite(value):
        raise ValueError(f"reasoning-gym's {made['task']} scored {value}")
    return min(1.0, max(0.0, value))


def extract_answer(text: str, truth: str | None) -> str:
    """The final answer in `text`; `truth` tells its form: a number, one line, or several.

    What is marked wins (`<answer>...</answer>`, `\\boxed{...}`, `####`), then what follows the
    last "answer is" or "answer:". Else it is the last number where `truth` is a number, the last
    line where it is one line, and the whole text where it is not.
    """
    found = final_answer(text)
    several_lines = truth is None or "\n" in truth
    if found is None and not several_lines:
        said = _SAID.findall(text)
        found = said[-1] if said else None
    if truth is not None and number(truth) is not None:
        numbers = _NUMBER.findall(text if found is None else found)
        return str(numbers[-1]) if numbers else ""
    if found is None:
        lines = text.strip().splitlines()
        found = text if several_lines else (lines[-1] if lines else "")
    if several_lines:
        return found.strip()
    return found.strip().strip("*`").rstrip(".").strip('*`"').strip()
