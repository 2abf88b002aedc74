"""Writes the table of attacks and tiers into a page, between its two markers.

python tests/attacks/write_table.py docs/security.md
"""

from __future__ import annotations

import sys
from pathlib import Path

from catalog import ATTACKS, ELSEWHERE, TIERS, Attack, End

BEGIN, END = "<!-- attacks:begin -->", "<!-- attacks:end -->"


def table() -> str:
    """Markdown."""
    heads = ["#", "Attack", *(f"`{tier}`" for tier in TIERS)]
    lines = [f"| {' | '.join(heads)} |", "|--" * len(heads) + "|"]
    cells: list[tuple[int, tuple[str, ...]]] = [(attack.line, _cells(attack)) for attack in ATTACKS]
    for numbers, where in ELSEWHERE.items():
        cells.append((int(numbers[:2]), (numbers, where, *("—" for _ in TIERS))))
    lines += [f"| {' | '.join(each)} |" for _, each in sorted(cells, key=lambda each: each[0])]
    return "\n".join(lines)


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
