"""Writes what the compatibility suite saw into a page, between its two markers.

python tests/agents/write_agents.py docs/compatibility.md FOLDER

The row of an agent that did not run, or failed, stays as it was; one that left the catalog goes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from real_agents import AGENTS

BEGIN, END = "<!-- agents:begin -->", "<!-- agents:end -->"
HEADS = {
    "agent": "Agent",
    "version": "Version",
    "dialect": "Dialect",
    "streamed": "Streamed",
    "turns": "Turns",
    "forks": "Forks",
    "exact": "Token-exact",
    "inline": "Inline",
}


def with_rows(page: str, seen: list[dict[str, str]]) -> str:
    """`page` with the cells of `seen` in place of theirs. Raises `ValueError` without markers."""
    before, begin, rest = page.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no {BEGIN} ... {END}: put both where the table belongs")
    rows: dict[str, dict[str, str]] = {}
    for cells in [_cells(line) for line in old.splitlines() if "|" in line]:
        rows[cells["agent"]] = cells
    for each in seen:
        rows[each["agent"]] = {**rows.get(each["agent"], {}), **each}
    shown = [rows[agent.name] for agent in AGENTS if agent.name in rows]
    lines = [
        _line(HEADS),
        "|--" * len(HEADS) + "|",
        *(_line({column: row.get(column, "") for column in HEADS}) for row in shown),
    ]
    return "\n".join([before + BEGIN, *lines, END + after])


def _cells(line: str) -> dict[str, str]:
    return dict(zip(HEADS, (cell.strip() for cell in line.strip("|").split("|")), strict=False))


def _line(cells: dict[str, str]) -> str:
    return f"| {' | '.join(cells.values())} |"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    seen = [json.loads(each.read_text()) for each in sorted(Path(sys.argv[2]).glob("*.json"))]
    path.write_text(with_rows(path.read_text(), seen))
