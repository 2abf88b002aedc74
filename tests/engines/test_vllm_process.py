"""A server's end, without a server."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from areal_sub.engines.vllm.process import VllmProcess

LEAVES_MEMORY = """
import os, time
from multiprocessing.shared_memory import SharedMemory
memory = SharedMemory(create=True, size=4096)
if os.fork() == 0:
    time.sleep(60)
print(memory.name, flush=True)
time.sleep(60)
"""


def is_there(name: str) -> bool:
    return Path("/dev/shm", name).exists()


def test_a_kill_ends_its_workers_and_takes_their_shared_memory_along() -> None:
    async def main() -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", LEAVES_MEMORY),
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        server = VllmProcess(process)
        assert process.stdout is not None
        name = (await process.stdout.readline()).decode().strip()
        assert is_there(name)
        server.kill()
        assert await server.ended == -9
        assert not is_there(name)
        await process.stdout.read()  # ends with the last of the group

    asyncio.run(asyncio.wait_for(main(), 30))
