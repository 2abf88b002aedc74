"""The command `areal-sub status`: who waits for whom in a run, right now.

Asks each process of the run itself, all at once and briefly, by the sockets that the trainer has
written down: so it says something of the others where one hangs, and of that one what the kernel
knows. Called by `cli.py`; raises `RunNotFound`.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from areal_sub.errors import ArealSubError
from areal_sub.inspection.find import find_run
from areal_sub.inspection.listing import json_line
from areal_sub.rpc import Client

ANSWER_S = 3.0
MAX_WAITS = 12  # of each process
NAMES = ("trainer", "engine", "proxy", "supervisor")
# Beside `status`, what a process counts.
_COUNTS = {"engine": "info", "proxy": "stats", "supervisor": "stats"}
_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for a disk",
    "T": "STOPPED by a signal",
    "t": "STOPPED by a debugger",
    "Z": "ended, and not yet waited for",
}


@dataclass(kw_only=True)
class Answer:
    """What one process said, and what the kernel says of it."""

    name: str
    pid: int | None = None
    state: str = "there is none"
    problem: str = ""  # "": it answered
    status: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)

    @property
    def waits(self) -> list[dict[str, Any]]:
        """Longest first: `what`, `about`, `age_s`, `limit_s`."""
        found: list[dict[str, Any]] = self.status.get("waits", [])
        return sorted(found, key=lambda wait: -wait["age_s"])


def show_status(run: str, *, as_lines: bool) -> int:
    """Print the run's state. Returns 1 where a process of it does not answer, or it has ended."""
    root = find_run(run)
    noted = root / "sockets"
    folder = Path(noted.read_text().strip()) if noted.exists() else None
    if folder is None or not folder.is_dir():
        text = f"{root}: the run is not going on"
        sys.stdout.write((json_line({"going_on": False}) if as_lines else text) + "\n")
        return 1
    answers = asyncio.run(_ask_all(folder))
    if as_lines:
        for answer in answers:
            sys.stdout.write(json_line(asdict(answer)) + "\n")
    else:
        _say(Console(highlight=False), root, answers)
    return int(any(answer.problem for answer in answers))


async def _ask_all(folder: Path) -> list[Answer]:
    names = [name for name in NAMES if name != "supervisor" or (folder / f"{name}.sock").exists()]
    return list(await asyncio.gather(*(_ask(folder, name) for name in names)))


async def _ask(folder: Path, name: str) -> Answer:
    path = folder / f"{name}.sock"
    answer = Answer(name=name, pid=_listener_of(path))
    if answer.pid is not None:
        answer.state = _state_of(answer.pid)
    client = Client(path, peer=name, redials=True)
    try:
        answer.status = await client.call("status", timeout_s=ANSWER_S)
        if (counts := _COUNTS.get(name)) is not None:
            answer.counts = await client.call(counts, timeout_s=ANSWER_S)
    except ArealSubError as error:
        answer.problem = str(error)
    finally:
        await client.close()
    return answer


def _listener_of(path: Path) -> int | None:
    """The process that listens at `path`, also where it is stopped: the kernel takes the call."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(path))
        except OSError:
            return None
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid: int = struct.unpack("3i", credentials)[0]
    return pid


def _state_of(pid: int) -> str:
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "it has ended"
    return _STATES.get(letter, letter)


def _say(console: Console, root: Path, answers: list[Answer]) -> None:
    console.print(Text(str(root), style="bold"))
    for answer in answers:
        head = f"{answer.name:10}  process {answer.pid or '-'}, {answer.state}"
        if answer.problem:
            console.print(Text(f"{head}: {answer.problem}", style="bold red"), soft_wrap=True)
            continue
        console.print(f"{head}; {_gist(answer)}", markup=False, soft_wrap=True)
        if not answer.waits:
            continue
        table = Table.grid(padding=(0, 2))
        for wait in answer.waits[:MAX_WAITS]:
            table.add_row(
                f"    {wait['age_s']:8.1f} s of {wait['limit_s']:g} s",
                Text(wait["what"]),
                Text(wait["about"]),
            )
        console.print(table)
        if len(answer.waits) > MAX_WAITS:
            console.print(f"    ... and {len(answer.waits) - MAX_WAITS} more waits: --json has all")


def _gist(answer: Answer) -> str:
    """One line of what it does."""
    status, counts = answer.status, answer.counts
    if answer.name == "trainer":
        doing = f"step {status['step']} of {status['num_steps']}: {status['doing']}"
        queues = ", ".join(f"{count} {name}" for name, count in status["queues"].items())
        ended = "".join(f"; {line}" for line in status["incidents"][-1:])
        return f"{doing} for {status['doing_for_s']:.1f} s; {queues}{ended}"
    if answer.name == "engine":
        return (
            f"policy version {counts['policy_version']}, {counts['num_running']} requests running, "
            f"{counts['num_waiting']} waiting"
        )
    if answer.name == "proxy":
        return f"{counts['num_open']} rollouts open, {counts['num_turns']} turns recorded"
    return (
        f"{counts['num_running']:g} children running, {counts['num_waiting']:g} waiting, "
        f"{counts['num_zygotes']:g} zygotes"
    )
