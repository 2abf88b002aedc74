"""A small configuration file in the test's own folder, which is also the working directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

SMALL = """\
experiment_name: tiny
trial_name: first
actor:
  path: models/tiny
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`write(more, text=SMALL)` → `config.yaml`, holding `text` and then `more`."""
    monkeypatch.chdir(tmp_path)

    def write_file(more: str = "", text: str = SMALL) -> Path:
        Path("config.yaml").write_text(text + more)
        return Path("config.yaml")

    return write_file
