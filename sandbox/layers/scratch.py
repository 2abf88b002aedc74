"""The child's own files: one tmpfs of bounded size and number of files, and its own /proc.

`/box/own` holds `home`, `work`, `tmp` and `shm`; `/tmp` and `/dev/shm` of the root lead there, as
`/dev/pts` and `/dev/ptmx` do to `pts`, where the child may have pseudo-terminals of its own.
/proc shows the child's own processes and nothing else of the kernel's (`subset=pid`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .. import kernel
from ..folders import PARTS
from .context import Context

NAME = "scratch"
ROOM = "/box"
"""A folder of the root, with nothing in it but `BOX`. What Landlock allows is allowed here: a rule
for a mount does not hold for one that is later mounted over it, one for the folder around does."""
BOX = f"{ROOM}/own"
TERMINALS = f"{BOX}/pts"
PROC_OPTIONS = "subset=pid,hidepid=invisible"


def probe() -> str:
    return ""  # a part of `namespaces`


def apply(args: Mapping[str, Any], context: Context) -> None:
    """`size_bytes`, `files`: the limits of the whole tmpfs; `terminals`: how many there can be;
    `proc`: with a /proc of its own."""
    flags = kernel.MS_NOSUID | kernel.MS_NODEV
    options = f"size={args['size_bytes']},nr_inodes={args['files']},mode=0755"
    kernel.mount("tmpfs", BOX, "tmpfs", flags, options)
    for part in (*PARTS, "shm"):
        os.mkdir(f"{BOX}/{part}", 0o700)
    if args["terminals"]:
        os.mkdir(TERMINALS)
        options = f"newinstance,ptmxmode=0666,mode=0620,max={args['terminals']}"
        kernel.mount("devpts", TERMINALS, "devpts", kernel.MS_NOSUID | kernel.MS_NOEXEC, options)
    if args["proc"]:
        proc_flags = flags | kernel.MS_NOEXEC | kernel.MS_RDONLY
        kernel.mount("proc", "/proc", "proc", proc_flags, PROC_OPTIONS)
