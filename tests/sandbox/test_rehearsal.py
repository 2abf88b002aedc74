"""What a first call touches is copied ahead by those that stand ready, and by nobody else."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

NUM_PAGES = 400
PROBE = f"""
import mmap, os, resource, socket
from sandbox import rehearsal

memory = mmap.mmap(-1, {2 * NUM_PAGES} * mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[:] = bytes(range(256)) * (len(memory) // 256)

def touch():
    for page in range(0, {2 * NUM_PAGES}, 2):
        memory[page * mmap.PAGESIZE] = 1

def child(requested):
    near, far = socket.socketpair()
    if requested:
        far.send(b"run")
    rehearsal.copy_ahead(near.fileno())
    kept = memory[:] == bytes(range(256)) * (len(memory) // 256)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    touch()
    print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, flush=True)

rehearsal.watch(touch)
for requested in (False, True):
    pid = os.fork()
    if pid == 0:
        try:
            child(requested)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
"""


def test_what_a_trial_has_written_to_is_copied_ahead_and_stays_as_it_is() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, timeout=60
    )
    waiting, requested = (line.split() for line in done.stdout.splitlines())
    assert waiting[0] == requested[0] == "True"
    assert int(waiting[1]) < NUM_PAGES // 10, "all of it was copied before"
    assert int(requested[1]) >= NUM_PAGES, "a request that is there does not wait for it"


def test_a_trial_that_fails_leaves_children_as_they_are() -> None:
    probe = (
        "import os\nfrom sandbox import rehearsal\nrehearsal.watch(lambda: os._exit(3))\n"
        "rehearsal.watch(lambda: 1 / 0)\nreader, _ = os.pipe()\nrehearsal.copy_ahead(reader)\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_children_that_stand_ready_have_their_pages(
    lab: Any, code: Path, below: Callable[..., list[psutil.Process]], eventually: Any
) -> None:
    pytest.importorskip("openai")
    (code / "sdk.py").write_text("import openai\ndef agent(data):\n    return 1.0\n")

    def own_bytes(pid: int) -> int:
        return min(
            (child.memory_full_info().uss for child in below(pid, "sandbox-child")), default=0
        )

    async def go() -> None:
        zygote = await lab.start(
            "sdk:agent", python=sys.executable, python_path=[str(code)], reserve=1
        )
        try:
            ready = "a child has made the pages of a call its own"
            await asyncio.to_thread(
                eventually, lambda: own_bytes(zygote.guardian_pid) > 5 * 2**20, ready
            )
            report = await zygote.run({})
            assert (report.value, report.num_killed) == (1.0, 0)
        finally:
            await zygote.close()

    lab.run(go())
