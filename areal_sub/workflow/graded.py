"""What the child of a grader runs: the user's grader, with its arguments made from plain data.

Imported in the grader's zygote, where `AREAL_SUB_GRADER` names the grader: importing this module
imports that, so that it fails where it fails. The contract is in `docs/rewards.md`.

Everything in the data but the task comes from an agent and is hostile: it is decoded here, in the
sandbox, and handed on as texts, bytes and numbers.
"""

from __future__ import annotations

import base64
import os
from typing import Any

from areal_sub.errors import WorkflowError
from areal_sub.workflow import GRADER_VARIABLE, bind_target, resolve_target
from areal_sub.workflow.transcript import branches


class Graded:
    """Constructed and run once per child; `kwargs` are `rollout.openai.reward_kwargs`."""

    def __init__(self, **kwargs: Any) -> None:
        if isinstance(_grader, type):
            self._grade, self._kwargs = bind_target(_grader, kwargs), {}
        else:
            self._grade, self._kwargs = bind_target(_grader, {}), kwargs

    def run(self, data: dict[str, Any]) -> Any:
        """What the grader returns; an awaitable where it is async."""
        main, others = branches(data["transcript"])
        return self._grade(
            data["task"],
            main,
            {path: base64.b64decode(content) for path, content in data["outputs"].items()},
            {**data["report"], "branches": others},
            **self._kwargs,
        )


def _resolved() -> Any:
    path = os.environ.get(GRADER_VARIABLE, "")
    if not path:
        raise WorkflowError(
            f"{GRADER_VARIABLE} is not set: this module is for the children of graders"
        )
    return resolve_target(path)


_grader = _resolved()
