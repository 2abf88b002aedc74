"""How a workspace could begin: unpacked into the child's own files, as it is, or as an overlay.

python -m benchmarks.workspace [--files 2000] [--bytes 5000] [--num 10]

Both in a user and mount namespace of this process's own (util-linux's `unshare` makes it), with the
bounded tmpfs that a child has: an overlay has it for its upper layer, and the template below. Then
what an agent does to a repository: list all of it, read a tenth, change ten files. The baseline, in
the same run, is a child without a workspace.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from sandbox import BlockingSandbox, Limits, SandboxSpec, kernel
from sandbox.unpacking import unpack
from sandbox.workspace import pack

CHANGED = 10


def make_template(folder: Path, num_files: int, num_bytes: int) -> None:
    for index in range(num_files):
        path = folder / f"package-{index // 50}" / f"module-{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * num_bytes)


def work(folder: str) -> None:
    """An agent's: as `git status`, a search and an edit would do."""
    paths = [str(path) for path in Path(folder).rglob("*.py")]
    for path in paths:
        Path(path).stat()
    for path in paths[::10]:
        Path(path).read_bytes()
    for path in paths[:CHANGED]:
        with open(path, "ab") as file:
            file.write(b"changed\n")


def inside(template: str, num: int) -> None:
    """In namespaces of its own: prints milliseconds, to begin and then to work, per way."""
    limits = Limits()
    packed = pack(template, limits)  # open for as long as it is held
    room = tempfile.mkdtemp()

    def by_unpacking(folder: str) -> None:
        os.chdir(folder)
        unpack(packed.fd)

    def by_overlay(folder: str) -> None:
        for part in ("upper", "inner", "seen"):
            Path(folder, part).mkdir()
        options = f"lowerdir={template},upperdir={folder}/upper,workdir={folder}/inner,userxattr"
        kernel.mount("overlay", f"{folder}/seen", "overlay", 0, options)

    ways: dict[str, tuple[Callable[[str], None], str]] = {
        "unpacked": (by_unpacking, ""),
        "overlay": (by_overlay, "/seen"),
    }
    for name, (begin, below) in ways.items():
        begun, worked = [], []
        for _ in range(num):
            kernel.mount("tmpfs", room, "tmpfs", 0, f"size={limits.scratch_bytes}")
            times = [time.process_time()]
            begin(room)
            times.append(time.process_time())
            work(room + below)
            times.append(time.process_time())
            os.chdir("/")
            kernel.unmount(room)
            begun.append(times[1] - times[0])
            worked.append(times[2] - times[1])
        first, then = (statistics.median(each) * 1000 for each in (begun, worked))
        print(f"{name:<12}{first:8.1f} ms to begin {then:8.1f} ms of work {first + then:8.1f} both")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--bytes", type=int, default=5000, help="of each file")
    parser.add_argument("--num", type=int, default=10)
    parser.add_argument("--inside", metavar="TEMPLATE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        inside(args.inside, args.num)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_template(Path(folder), args.files, args.bytes)
        print(
            f"{args.files} files of {args.bytes} bytes; CPU of this process, median of {args.num}"
        )
        own = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-m"]
        more = ["benchmarks.workspace", "--inside", folder, "--num", str(args.num)]
        subprocess.run([*own, *more], check=True)
        with BlockingSandbox(SandboxSpec(env={"PATH": "/usr/bin:/bin"})) as box:
            for name, workspace in (("none", None), ("unpacked", folder)):
                reports = [box.execute(["true"], workspace=workspace) for _ in range(args.num)]
                took = statistics.median(report.wall_s for report in reports) * 1000
                print(f"a whole child, workspace {name:<9}{took:8.1f} ms by the clock")


if __name__ == "__main__":
    main()
