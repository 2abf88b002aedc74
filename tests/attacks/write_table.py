"""Writes the tables of attacks and tiers into a page, between its two markers.

python tests/attacks/write_table.py docs/security.md
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

from catalog import ATTACKS, TIERS, Attack, End

BEGIN, END = "<!-- attacks:begin -->", "<!-- attacks:end -->"


# The first line of each, as the catalogue numbers them.
GROUPS = {
    1: "Files",
    17: "Processes",
    27: "Secrets",
    33: "Kernel surface",
    44: "Network",
    50: "Resources",
    59: "The proxy",
    69: "The house",
}
LAST = 74


def table() -> str:
    """Markdown: one table for each group."""
    rows = {attack.number: _cells(attack) for attack in ATTACKS}
    heads = ["#", "Attack", *(f"`{tier}`" for tier in TIERS)]
    parts = []
    firsts = [*GROUPS, LAST + 1]
    for first, after in pairwise(firsts):
        of_group = [rows[number] for number in sorted(rows) if first <= int(number[:2]) < after]
        lines = [f"### {GROUPS[first]} ({first} to {after - 1})", ""]
        lines += [f"| {' | '.join(heads)} |", "|--" * len(heads) + "|"]
        lines += [f"| {' | '.join(cells)} |" for cells in of_group]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _cells(attack: Attack) -> tuple[str, ...]:
    number = attack.number.lstrip("0")
    return (number, attack.title, *(_both(attack, tier) for tier in TIERS))


def _both(attack: Attack, tier: str) -> str:
    with_groups, without = (attack.end(tier, cgroups=given) for given in (True, False))
    if with_groups == without:
        return _shown(without)
    return f"with cgroups: {_shown(with_groups)}; without: {_shown(without)}"


def _shown(end: End) -> str:
    return f"stopped: {end.says}" if end.stopped else f"**not stopped.** {end.says}"


def with_table(page: str) -> str:
    """`page` with the present table between its markers. Raises `ValueError` where they lack."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no {BEGIN} ... {END}: put both where the table belongs")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text()))
