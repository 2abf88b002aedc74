"""A warm process that forks a child per line of its input: `python -m benchmarks.bare_fork`.

As warm as a zygote: the SDK imported and exercised, garbage frozen. Prints each child's exit code.
"""

from __future__ import annotations

import gc
import os
import sys

from sandbox.target import resolve
from sandbox.warmup import stub_listener, warm_up


def main() -> None:
    target, port = sys.argv[1:]
    with stub_listener() as listener:
        warm_up(listener)
    function = resolve(target)
    os.environ |= {"OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1", "OPENAI_API_KEY": "key"}
    gc.collect()
    gc.freeze()
    print("ready", flush=True)
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                function({})
                code = 0
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
