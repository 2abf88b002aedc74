"""`areal-sub`, with `scripted_engine` where the embedded engine would be started."""

from __future__ import annotations

from typing import Any

from areal_sub.cli import main
from areal_sub.schedulers.local import Component

ENGINE = "areal_sub.engines.embedded"

if __name__ == "__main__":
    start = Component.start

    async def start_scripted(name: str, module: str, *args: Any, **kwargs: Any) -> Component:
        module = "scripted_engine" if module == ENGINE else module
        return await start(name, module, *args, **kwargs)

    Component.start = start_scripted  # type: ignore[method-assign]
    main()
