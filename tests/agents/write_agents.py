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
COLUMNS = ("agent", "version", "dialect", "streamed", "turns", "forks", "exact")
HEAD = ("Agent", "Version", "Dialect", "Streamed", "Turns", "Forks", "Token-exact")


def with_rows(page: str, seen: list[dict[str, str]]) -> str:
    """`page` with the rows of `seen` in place of theirs. Raises `ValueError` without markers."""
    before, begin, rest = page.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no {BEGIN} ... {END}: put both where the table belongs")
    rows = {line.split("|")[1].strip(): line for line in old.splitlines() if "|" in line}
    for each in seen:
        rows[each["agent"]] = f"| {' | '.join(each[column] for column in COLUMNS)} |"
    shown = [rows[agent.name] for agent in AGENTS if agent.name in rows]
    lines = [f"| {' | '.join(HEAD)} |", f"|{'--|' * len(HEAD)}", *shown]
    return "\n".join([before + BEGIN, *lines, END + after])


if __name__ == "__main__":
    path = Path(sys.argv[1])
    seen = [json.loads(each.read_text()) for each in sorted(Path(sys.argv[2]).glob("*.json"))]
    path.write_text(with_rows(path.read_text(), seen))
