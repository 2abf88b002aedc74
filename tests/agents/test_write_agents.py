"""The table of docs/compatibility.md, from what a run of the suite saw."""

from __future__ import annotations

import pytest
from real_agents import AGENTS
from write_agents import BEGIN, END, HEADS, with_rows

FIRST, SECOND = AGENTS[0].name, AGENTS[1].name
OLD = f"""before
{BEGIN}
| Agent | Version | Dialect |
|--|--|--|
| {SECOND} | openai 1 | chat |
| left the catalog | x 1 | chat |
{END}
after
"""


def rows(page: str) -> list[list[str]]:
    table = page.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_what_was_seen_replaces_what_stood_there_and_the_rest_stays() -> None:
    page = with_rows(
        OLD,
        [
            {"agent": SECOND, "inline": "yes"},
            {"agent": FIRST, "version": "openai 2", "dialect": "chat"},
        ],
    )
    empty = [""] * (len(HEADS) - 3)
    assert rows(page) == [
        list(HEADS.values()),
        ["--"] * len(HEADS),
        [FIRST, "openai 2", "chat", *empty],
        [SECOND, "openai 1", "chat", *empty[1:], "yes"],
    ]
    assert page.startswith("before\n") and page.endswith("\nafter\n")
    assert with_rows(page, []) == page


def test_a_page_without_a_place_for_it_is_refused() -> None:
    with pytest.raises(ValueError, match="put both where the table belongs"):
        with_rows("no table here", [])
