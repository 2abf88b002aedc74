"""A warm process that forks a child per line of its input: `python -m benchmarks.bare_fork`.

As warm as a zygote: the SDK imported and exercised, memory packed, frozen and on huge pages. Prints
each child's exit code. What this costs no sandbox that forks per child can go below.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import sys

from benchmarks.one_turn import TASK
from sandbox import density, kernel
from sandbox.target import bind, resolve
from sandbox.warmup import stub_listener, warm_up, warm_up_imported


def main() -> None:
    target, port = sys.argv[1:]
    with stub_listener() as listener:
        warm_up(listener)
        agent = resolve(target)
        warm_up_imported(listener)
    os.environ |= {"OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1", "OPENAI_API_KEY": "key"}
    density.settle()
    kernel.collapse_private_memory()
    print("ready", flush=True)
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                value = bind(agent, {})(TASK)
                if inspect.iscoroutine(value):
                    value = asyncio.run(value)
                code = int(value != 1.0)
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
