"""A learner's process that is not the trainer: `python -m areal_sub.learner SETTINGS.json`.

Settings: `actor` (`ActorConfig` as plain values), `model_path`, `learner_state` (path or null),
`temperature`, `total_steps`, `seed`, `rank`, `folder`, `join_timeout_s`. Started by the trainer,
which is rank 0, and ended by it.
"""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any, NoReturn

from areal_sub.component import run_component
from areal_sub.config.schema import ActorConfig
from areal_sub.learner.learner import Learner
from areal_sub.learner.ranks import RankPlace


async def main(settings: dict[str, Any]) -> None:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def work() -> None:
        try:
            _follow(settings)
        except BaseException as error:  # whatever it is, the process ends by it
            loop.call_soon_threadsafe(ended.set_exception, error)

    # A thread that nobody waits for: it may hang in a wait for a rank that is gone.
    threading.Thread(target=work, daemon=True).start()
    try:
        await ended
    except asyncio.CancelledError:
        os._exit(0)  # the trainer is gone, or wants us gone; nothing here is worth keeping


def _follow(settings: dict[str, Any]) -> NoReturn:
    actor = ActorConfig.model_validate(settings["actor"])
    learner = Learner.load(
        actor,
        path=settings["model_path"],
        temperature=settings["temperature"],
        total_steps=settings["total_steps"],
        seed=settings["seed"],
        place=RankPlace(
            rank=settings["rank"],
            num_ranks=actor.num_processes,
            folder=Path(settings["folder"]),
            join_timeout_s=settings["join_timeout_s"],
            timeout_s=actor.rank_timeout_s,
        ),
    )
    state = settings["learner_state"]
    learner.follow(Path(state) if state else None)


if __name__ == "__main__":
    run_component("learner", main)
