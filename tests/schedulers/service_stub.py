"""A component that serves nothing but what every `rpc.Server` does, or refuses to."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from areal_sub.component import run_component
from areal_sub.errors import ModelError
from areal_sub.rpc import Server


async def main(settings: dict[str, Any]) -> None:
    if "refuses" in settings:
        raise ModelError(settings["refuses"])
    server = Server(Path(settings["socket_path"]), {})
    await server.start()
    try:
        await asyncio.Event().wait()
    finally:
        await server.close()


if __name__ == "__main__":
    run_component("stub", main)
