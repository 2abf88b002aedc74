"""The reference page is current, and has words for everything in the schema."""

from __future__ import annotations

from pathlib import Path

import pytest

from areal_sub.config import areal
from areal_sub.config.keys import all_keys
from areal_sub.config.reference import reference

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_page_is_current() -> None:
    assert PAGE.read_text() == reference(), "run `make docs`"


def test_every_key_is_on_it() -> None:
    page = reference()
    for key in all_keys():
        assert key.expected
        assert f"`{key.path.rpartition('.')[2]}`" in page


@pytest.mark.parametrize("old", areal.RENAMED)
def test_old_names_lead_to_keys_that_exist(old: str) -> None:
    paths = {key.path for key in all_keys()}
    assert old not in paths
    assert areal.RENAMED[old] in paths


def test_no_hint_is_meant_for_a_key_that_exists() -> None:
    # hints are asked for unknown keys only, so the one key that `*.fileroot` is about may match
    assert [key.path for key in all_keys() if areal.hint(key.path)] == ["cluster.fileroot"]
