"""A child of a trainer with keys in its environment and its HOME looks for them, everywhere."""

from __future__ import annotations

import os
from typing import Any

import pytest
from catalog import TIERS

from sandbox import Ending

pytestmark = pytest.mark.attacks


@pytest.mark.parametrize("stage", [*TIERS, "gvisor"], indirect=True)
def test_a_child_finds_no_secret_of_the_trainer(stage: Any) -> None:
    own = stage.canary("own")
    world = stage.world

    async def go() -> Any:
        zygote = await stage.zygote("secrets_search:act", cpu_s=60, total_cpu_s=60)
        with world.as_trainer():
            folders = [os.environ["HOME"], str(world.project), str(stage.folder)]
            assert os.environ["OPENAI_API_KEY"].startswith("CANARY-env-")
            # In gVisor a look at a file takes a millisecond: the system's own are left out there.
            skipped = ["usr", "lib"] if stage.tier == "gvisor" else []
            since = world.made_at - 60.0
            request = {"folders": folders, "since": since, "skipped": skipped}
            return await zygote.run(request, env={"OWN_KEY": own}, wall_s=90.0)

    report = stage.run(go())
    assert report.ending is Ending.RETURNED, report
    num, found = report.value["num"], report.value["found"]
    for where in ("environment", "memory", "/proc", "files"):
        assert own in found[where], f"the search of {where} is blind"
    assert {name for names in found.values() for name in names} == {own}
    assert num["descriptors"] >= 4
    least = 10 if stage.tier == "gvisor" else 1000
    assert num["names"] > least, "the interpreter's own files, at least"
